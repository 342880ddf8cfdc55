/// @file
/// The walk over a job's Python objects that makes the StateDict for the engine.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>
#include <vector>

#include "strandline/state_dict.h"

namespace strandline::python {

namespace nb = nanobind;

/// An object whose `state_dict()` stands in its place in the state.
struct StatefulObject {
  std::string key_path;
  nb::object object;
  std::uint32_t node = 0;  ///< Of its state.
};

/// A state and what its views borrow from. Must be destroyed with the GIL.
struct Collected {
  StateDict state;
  std::vector<nb::object> tensors;      ///< By tensor of `state`: the tensor or array.
  std::vector<nb::object> memory;       ///< Likewise: what holds its bytes.
  std::vector<StatefulObject> objects;  ///< In the order of the walk.
  nb::object root;                      ///< Holds everything else that was walked.
  std::vector<nb::object> state_dicts;  ///< What the objects' state_dict() gave.
};

/// Walks `root`, a dict or an object with `state_dict()`. Raises UnsupportedError or
/// InvalidArgumentError naming the key path, and what the user's code (state_dict(), pickling)
/// raises as an UnsupportedError's cause. REQUIRES: the GIL.
Collected collect(nb::handle root, bool allow_pickle);

/// The same for a tree that must not hold tensors, such as the metadata of a save; `what` names it
/// in errors.
StateDict collect_plain(nb::handle root, const char* what);

}  // namespace strandline::python
