/// @file
/// From what the engine read to Python objects: memory for tensors, and the tree.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <unordered_map>
#include <vector>

#include "arrays.h"
#include "strandline/checkpoint.h"

namespace strandline::python {

namespace nb = nanobind;

/// The tensors and arrays that the engine asked for while it read. Must be destroyed with the GIL,
/// after the views that the engine returned are no longer used.
class Allocations {
 public:
  /// The callback for the engine; `*this` must outlive its calls. It takes the GIL.
  [[nodiscard]] Allocator allocator();

  /// Raises what Python raised in the callback, if it did.
  void raise_pending();

  /// The object whose memory begins at a view's: made for this tensor, or over a part of one made
  /// for another.
  [[nodiscard]] nb::object object_of(const Structure& structure, std::uint32_t tensor,
                                     const TensorView& view) const;

 private:
  Result<TensorView> allocate(const Structure& structure, std::uint32_t tensor);

  std::unordered_map<std::uint32_t, NewArray> by_tensor_;
  std::map<const std::byte*, std::uint32_t> by_address_;  ///< The tensor whose memory begins there.
  std::optional<nb::python_error> pending_;
};

/// What the tensors of a tree become: index of the tensor to its object.
using TensorObjects = std::vector<nb::object>;

/// What the plain values of a tree become: index of the value to its object.
using ValueObjects = std::vector<nb::object>;

/// The objects of the plain values of a state's node and all below it. Raises UnsupportedError
/// naming the key path of a value that cannot be made. REQUIRES: the GIL.
ValueObjects values_of(const StateDict& state, std::uint32_t node, bool allow_pickle);

/// The Python tree of the node of a state and all below it. Raises UnsupportedError naming the key
/// path of a dict that Python cannot hold. Tensors without an object, which stand in dicts only,
/// are left out. REQUIRES: the GIL.
nb::object tree_of(const StateDict& state, std::uint32_t node, const TensorObjects& tensors,
                   const ValueObjects& values);

/// The plain values of the checkpoint that restore() is about to read: made, and the tree with
/// them, before anything is changed, so that what Python cannot hold is refused in time. Must be
/// destroyed with the GIL.
class PreparedValues {
 public:
  explicit PreparedValues(bool allow_pickle) : allow_pickle_(allow_pickle) {}

  /// The callback for the engine (RestoreOptions::accept); `*this` must outlive its calls. It takes
  /// the GIL.
  [[nodiscard]] std::function<Status(const Checkpoint&)> callback() {
    return [this](const Checkpoint& checkpoint) { return prepare(checkpoint.tree()); };
  }

  /// Raises what Python raised in the callback, if it did.
  void raise_pending();

  /// Those of the checkpoint that was accepted last.
  [[nodiscard]] const ValueObjects& values() const { return values_; }

 private:
  Status prepare(const StateDict& state);

  ValueObjects values_;
  std::optional<nb::python_error> pending_;
  bool allow_pickle_;
};

}  // namespace strandline::python
