// The tree of a state dict in JSON, leaf by leaf. docs/format.md describes the encoding.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "format/json_reader.h"
#include "strandline/error.h"
#include "strandline/state_dict.h"

namespace strandline::format {

// Appends what stands for a tensor, by its index among the tensors: one whole JSON value.
using AppendTensor = std::function<Status(std::string& out, std::uint32_t tensor)>;

// Appends a tree. Fails with kUnsupported and the key path on a key or value that cannot be
// written (see append_value), and as append_tensor does.
[[nodiscard]] Status append_tree(std::string& out, const StateDict& state,
                                 const AppendTensor& append_tensor);

// Makes the view of a tensor from the member of its object, "tensor" or "alias"; called in tree
// order.
using ReadTensor = std::function<Result<TensorView>(std::string_view kind, const JsonNode& body)>;

// Reads a tree. Fails with kCorrupt, and as read_tensor does. An OrderedDict's `_metadata` comes
// after its items.
[[nodiscard]] Result<StateDict> read_tree(const JsonNode& node, const ReadTensor& read_tensor);

}  // namespace strandline::format
