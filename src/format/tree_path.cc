#include "format/tree_path.h"

#include <algorithm>
#include <string_view>

#include "format/value_json.h"

namespace strandline::format {
namespace {

constexpr std::string_view kMetadataStep = R"({"metadata":true})";

Status append_step(std::string& out, const Structure::Node& node) {
  if (!node.metadata) return append_value(out, node.key);
  out += kMetadataStep;
  return {};
}

std::string under_parent(std::uint32_t parent, std::string_view step) {
  std::string text;
  for (int shift = 0; shift < 32; shift += 8) text += static_cast<char>(parent >> shift & 0xff);
  return text.append(step);
}

Result<std::string> read_step(const JsonNode& node) {
  if (node.type() == JsonNode::Type::kObject) {
    STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
    if (members.find("metadata")) return std::string(kMetadataStep);
  }
  STRANDLINE_ASSIGN_OR_RETURN(const Value key, read_value(node));
  std::string step;
  STRANDLINE_RETURN_IF_ERROR(append_value(step, key));
  return step;
}

}  // namespace

Status append_tree_path(std::string& out, const Structure& structure, std::uint32_t node) {
  std::vector<std::uint32_t> way;  // From the node up.
  for (; node != 0; node = structure.nodes()[node].parent) way.push_back(node);
  out += '[';
  for (auto i = way.rbegin(); i != way.rend(); ++i) {
    if (i != way.rbegin()) out += ',';
    STRANDLINE_RETURN_IF_ERROR(append_step(out, structure.nodes()[*i]));
  }
  out += ']';
  return {};
}

Result<TreePath> read_tree_path(const JsonNode& node) {
  TreePath path;
  STRANDLINE_RETURN_IF_ERROR(node.for_each_item([&](const JsonNode& item, std::size_t) -> Status {
    STRANDLINE_ASSIGN_OR_RETURN(std::string step, read_step(item));
    path.push_back(std::move(step));
    return {};
  }));
  return path;
}

TreePathIndex::TreePathIndex(const Structure& structure) {
  const auto& nodes = structure.nodes();
  steps_.reserve(nodes.size());
  std::string step;
  for (std::uint32_t i = 1; i < nodes.size(); ++i) {
    step.clear();
    if (append_step(step, nodes[i])) steps_.emplace_back(under_parent(nodes[i].parent, step), i);
  }
  std::sort(steps_.begin(), steps_.end());
}

std::optional<std::uint32_t> TreePathIndex::find(const TreePath& path) const {
  std::uint32_t node = 0;
  for (const std::string& step : path) {
    const std::string wanted = under_parent(node, step);
    const auto found = std::lower_bound(
        steps_.begin(), steps_.end(), wanted,
        [](const auto& entry, const std::string& text) { return entry.first < text; });
    if (found == steps_.end() || found->first != wanted) return std::nullopt;
    node = found->second;
  }
  return node;
}

}  // namespace strandline::format
