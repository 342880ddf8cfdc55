// Compares what was saved with where it should go, before anything is changed. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "strandline/error.h"
#include "strandline/state_dict.h"

namespace strandline::checkpoint {

struct Match {
  // For each saved tensor, the destination's tensor that it belongs into, if any.
  std::vector<std::optional<std::uint32_t>> destination;
  // Plain values to assign: saved value index, destination value index.
  std::vector<std::pair<std::uint32_t, std::uint32_t>> values;
  std::vector<std::string> missing;             // Names that only the destination has.
  std::vector<std::string> unexpected;          // Names that only the checkpoint has,
  std::vector<std::uint32_t> unexpected_nodes;  // and their nodes in the saved tree.
  std::vector<std::string> different;           // "name: saved as …, the destination is …".
};

// Names are compared in non-empty dicts only. An empty dict, None, and a list or tuple without
// tensors and objects in the destination take whatever was saved there: they match nothing and miss
// nothing. A list or tuple with tensors, which somebody else may hold too, is compared item by
// item; if it has another length than the saved one (a history that grows), it too takes what was
// saved.
//
// `objects` are the containers of the destination that stand for objects of the caller's (see
// RestoreOptions::objects). No value can take the place of an object, so a list or tuple that holds
// one must have been saved with the same length, and an object takes its own sort of container
// only.
[[nodiscard]] Match match(const StateDict& saved, const StateDict& destination,
                          const std::vector<std::uint32_t>& objects = {});

// The error that lists everything in the way of restoring, or success. `strict` makes missing and
// unexpected names count; different shapes and dtypes always do.
[[nodiscard]] Status check_match(const Match& match, bool strict);

}  // namespace strandline::checkpoint
