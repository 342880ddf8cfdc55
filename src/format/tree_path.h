// Paths in the tree of a manifest: the typed keys from the root to a node, as JSON.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "format/json_reader.h"
#include "strandline/error.h"
#include "strandline/state_dict.h"

namespace strandline::format {

// Appends the path of a node as an array: its keys as values, list indices as integers, and
// {"metadata":true} for the `_metadata` of an OrderedDict. Fails as append_value does.
[[nodiscard]] Status append_tree_path(std::string& out, const Structure& structure,
                                      std::uint32_t node);

// A path as read: each step as append_tree_path writes it, so that texts can be compared.
using TreePath = std::vector<std::string>;

// Reads what append_tree_path wrote. Fails with kCorrupt on anything else.
[[nodiscard]] Result<TreePath> read_tree_path(const JsonNode& node);

// Finds nodes by their path. Structure::find looks through all children at every step; a hostile
// manifest could make that quadratic, so this one sorts all nodes once.
class TreePathIndex {
 public:
  // REQUIRES: keys that can be written as JSON.
  explicit TreePathIndex(const Structure& structure);

  [[nodiscard]] std::optional<std::uint32_t> find(const TreePath& path) const;

 private:
  // Each node under its parent and the step from there, as one text that sorts.
  std::vector<std::pair<std::string, std::uint32_t>> steps_;
};

}  // namespace strandline::format
