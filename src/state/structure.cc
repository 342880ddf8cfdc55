// Looking things up in the tree of a state dict.

#include <algorithm>

#include "strandline/state_dict.h"

namespace strandline::inline v0 {
namespace {

// What people write for a key: text as it is, anything else as its text.
std::string key_text(const Key& key) {
  const auto* name = key.get_if<std::string>();
  return name != nullptr ? *name : key.text();
}

}  // namespace

std::uint64_t Structure::Tensor::byte_count() const {
  TensorView view;
  view.dtype = dtype;
  view.shape = shape;
  return view.byte_count();
}

KeyPath Structure::path(std::uint32_t node) const {
  KeyPath path;
  for (; node != 0; node = nodes_[node].parent) {
    path.push_back(nodes_[node].metadata ? Key("_metadata") : nodes_[node].key);
  }
  std::reverse(path.begin(), path.end());
  return path;
}

std::string Structure::path_text(std::uint32_t node) const { return key_path_text(path(node)); }

std::optional<std::uint32_t> Structure::child(std::uint32_t node, const Key& key) const {
  for (std::uint32_t i = node + 1; i < nodes_[node].end; i = nodes_[i].end) {
    if (!nodes_[i].metadata && nodes_[i].key.identical(key)) return i;
  }
  return std::nullopt;
}

std::optional<std::uint32_t> Structure::find(const KeyPath& path) const {
  std::uint32_t node = 0;
  for (const Key& key : path) {
    const auto next = child(node, key);
    if (!next) return std::nullopt;
    node = *next;
  }
  return node;
}

std::optional<std::uint32_t> Structure::find(std::string_view path) const {
  // Depth first over the ways to cut the path at dots, longest first key first; bounded by the
  // depth of the tree, since every step consumes a key.
  struct Cut {
    std::uint32_t node;
    std::string_view rest;
  };
  std::vector<Cut> open{{0, path}};
  while (!open.empty()) {
    const Cut cut = open.back();
    open.pop_back();
    std::vector<std::pair<std::size_t, std::uint32_t>> matches;  // Key length, child.
    for (std::uint32_t i = cut.node + 1; i < nodes_[cut.node].end; i = nodes_[i].end) {
      if (nodes_[i].metadata) continue;
      const std::string key = key_text(nodes_[i].key);
      if (cut.rest == key) return i;
      if (cut.rest.size() > key.size() && cut.rest.starts_with(key) &&
          cut.rest[key.size()] == '.') {
        matches.emplace_back(key.size(), i);
      }
    }
    std::sort(matches.begin(), matches.end());  // The longest key is tried first: on top.
    for (const auto& [length, node] : matches) open.push_back({node, cut.rest.substr(length + 1)});
  }
  return std::nullopt;
}

}  // namespace strandline::inline v0
