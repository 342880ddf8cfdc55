#include "checkpoint/match.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>
#include <unordered_map>

namespace strandline::checkpoint {
namespace {

using Node = Structure::Node;

bool is_dict(NodeKind kind) {
  return kind == NodeKind::kDict || kind == NodeKind::kOrderedDict || kind == NodeKind::kCounter;
}

bool is_sequence(NodeKind kind) { return kind == NodeKind::kList || kind == NodeKind::kTuple; }

std::string_view kind_name(NodeKind kind) {
  switch (kind) {
    case NodeKind::kDict:
      return "a dict";
    case NodeKind::kOrderedDict:
      return "an OrderedDict";
    case NodeKind::kCounter:
      return "a Counter";
    case NodeKind::kList:
      return "a list";
    case NodeKind::kTuple:
      return "a tuple";
    case NodeKind::kTensor:
      return "a tensor";
    case NodeKind::kValue:
      return "a plain value";
  }
  return "something else";
}

std::string tensor_text(const Structure::Tensor& tensor) {
  return fmt::format("{} [{}]", dtype_name(tensor.dtype), fmt::join(tensor.shape, ", "));
}

// Keys told apart by their type and text; doubles by their 17 digits, which is every bit but NaN's.
std::string identity(const Key& key) {
  return fmt::format("{}{}", key.data().index(), key_path_text({key}));
}

class Matcher {
 public:
  Matcher(const StateDict& saved, const StateDict& destination,
          const std::vector<std::uint32_t>& objects)
      : saved_(saved), destination_(destination) {
    match_.destination.resize(saved.tensors().size());
    // In pre-order, so that an object inside another one comes after it and is left out.
    std::vector<std::uint32_t> in_order = objects;
    std::sort(in_order.begin(), in_order.end());
    for (const std::uint32_t object : in_order) {
      if (objects_.empty() || object >= own_node(objects_.back()).end) objects_.push_back(object);
    }
  }

  Match run() {
    visit(0, 0);
    return std::move(match_);
  }

 private:
  [[nodiscard]] const Node& saved_node(std::uint32_t node) const {
    return saved_.structure().nodes()[node];
  }
  [[nodiscard]] const Node& own_node(std::uint32_t node) const {
    return destination_.structure().nodes()[node];
  }

  // Recursion is bounded by kStateDepthMax.
  void visit(std::uint32_t saved, std::uint32_t own) {
    const Node& s = saved_node(saved);
    const Node& d = own_node(own);
    if (is_object(own) && !same_sort(s.kind, d.kind)) {
      return differ(own, kind_name(s.kind),
                    fmt::format("an object whose state is {}", kind_name(d.kind)));
    }
    if (is_dict(d.kind)) {
      if (d.end == own + 1) return;
      if (!is_dict(s.kind)) return differ(own, kind_name(s.kind), "a dict with entries");
      return visit_dict(saved, own);
    }
    if (is_sequence(d.kind)) return visit_sequence(saved, own);
    if (d.kind == NodeKind::kTensor) {
      if (s.kind != NodeKind::kTensor) return differ(own, kind_name(s.kind), "a tensor");
      return visit_tensor(s, d, own);
    }
    if (s.kind == NodeKind::kValue) {
      match_.values.emplace_back(s.leaf, d.leaf);
    } else if (s.kind != NodeKind::kTensor &&
               !destination_.values()[d.leaf].get_if<Value::None>()) {
      differ(own, kind_name(s.kind), "a plain value");
    }
  }

  void visit_dict(std::uint32_t saved, std::uint32_t own) {
    std::unordered_map<std::string, std::uint32_t> by_key;
    for (std::uint32_t i = saved + 1; i < saved_node(saved).end; i = saved_node(i).end) {
      if (!saved_node(i).metadata) by_key.emplace(identity(saved_node(i).key), i);
    }
    for (std::uint32_t i = own + 1; i < own_node(own).end; i = own_node(i).end) {
      if (own_node(i).metadata) continue;
      const auto found = by_key.find(identity(own_node(i).key));
      if (found == by_key.end()) {
        match_.missing.push_back(destination_.structure().path_text(i));
        continue;
      }
      visit(found->second, i);
      by_key.erase(found);
    }
    for (std::uint32_t i = saved + 1; i < saved_node(saved).end; i = saved_node(i).end) {
      if (saved_node(i).metadata || !by_key.contains(identity(saved_node(i).key))) continue;
      match_.unexpected.push_back(saved_.structure().path_text(i));
      match_.unexpected_nodes.push_back(i);
    }
  }

  void visit_sequence(std::uint32_t saved, std::uint32_t own) {
    const bool objects = holds_object(own);
    if (!objects && !holds_tensor(own)) return;
    const std::vector<std::uint32_t> own_items = items(destination_.structure(), own);
    std::string saved_text(kind_name(saved_node(saved).kind));
    if (is_sequence(saved_node(saved).kind)) {
      const std::vector<std::uint32_t> saved_items = items(saved_.structure(), saved);
      if (saved_items.size() == own_items.size()) {
        for (std::size_t i = 0; i < own_items.size(); ++i) visit(saved_items[i], own_items[i]);
        return;
      }
      saved_text += fmt::format(" of length {}", saved_items.size());
    }
    if (!objects) return;
    differ(own, saved_text,
           fmt::format("{} of length {} that holds objects, which cannot be made or replaced: give "
                       "it as many as were saved",
                       kind_name(own_node(own).kind), own_items.size()));
  }

  static std::vector<std::uint32_t> items(const Structure& structure, std::uint32_t sequence) {
    const std::vector<Node>& nodes = structure.nodes();
    std::vector<std::uint32_t> found;
    for (auto i = sequence + 1; i < nodes[sequence].end; i = nodes[i].end) found.push_back(i);
    return found;
  }

  static bool same_sort(NodeKind a, NodeKind b) {
    return is_dict(a) == is_dict(b) && is_sequence(a) == is_sequence(b);
  }

  [[nodiscard]] bool is_object(std::uint32_t own) const {
    return std::binary_search(objects_.begin(), objects_.end(), own);
  }

  // Below the node: an object's own lists hold nothing that anybody else needs.
  [[nodiscard]] bool holds_object(std::uint32_t own) const {
    const auto next = std::upper_bound(objects_.begin(), objects_.end(), own);
    return next != objects_.end() && *next < own_node(own).end;
  }

  [[nodiscard]] bool holds_tensor(std::uint32_t own) const {
    for (auto i = own; i < own_node(own).end; ++i) {
      if (own_node(i).kind == NodeKind::kTensor) return true;
    }
    return false;
  }

  void visit_tensor(const Node& saved, const Node& own, std::uint32_t own_index) {
    const Structure::Tensor& s = saved_.structure().tensors()[saved.leaf];
    const Structure::Tensor& d = destination_.structure().tensors()[own.leaf];
    if (s.dtype != d.dtype || s.shape != d.shape) {
      return differ(own_index, tensor_text(s), tensor_text(d));
    }
    match_.destination[saved.leaf] = own.leaf;
  }

  void differ(std::uint32_t own, std::string_view saved, std::string_view here) {
    match_.different.push_back(fmt::format("{}: saved as {}, here {}",
                                           destination_.structure().path_text(own), saved, here));
  }

  const StateDict& saved_;
  const StateDict& destination_;
  std::vector<std::uint32_t> objects_;  // Outermost ones, ascending.
  Match match_;
};

void append_names(std::string& text, std::string_view title,
                  const std::vector<std::string>& names) {
  if (names.empty()) return;
  text += fmt::format("; {} ({}): {}", title, names.size(), fmt::join(names, ", "));
}

}  // namespace

Match match(const StateDict& saved, const StateDict& destination,
            const std::vector<std::uint32_t>& objects) {
  return Matcher(saved, destination, objects).run();
}

Status check_match(const Match& match, bool strict) {
  const bool names_differ = strict && !(match.missing.empty() && match.unexpected.empty());
  if (match.different.empty() && !names_differ) return {};
  std::string text = "the checkpoint does not fit the state";
  append_names(text, "different", match.different);
  if (strict) {
    append_names(text, "missing from the checkpoint", match.missing);
    append_names(text, "unexpected, only in the checkpoint", match.unexpected);
  }
  if (!match.different.empty()) {
    text += "; build the state with the saved shapes and types, or load() those tensors by key";
  }
  if (names_differ) text += "; pass strict=False to leave such names alone";
  return failure(ErrorCode::kMismatch, std::move(text));
}

}  // namespace strandline::checkpoint
