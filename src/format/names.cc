// Names on disk.
//
// Names of tensors and groups come from whatever keys a user's dicts have; names of files must work
// on every file system, and names in a shard must be distinct. Both are labels made from the keys:
// readable in the usual case, and made distinct by a `~2` in the others. Nothing ever reads a key
// back from a label, since the manifest's tree holds the keys themselves.
//
// File names of a step cannot collide. Shards end in ".safetensors", indexes in
// ".safetensors.index.json", and nothing else ends in either. A shard's stem can be told from its
// name (what remains when "-<digits>-of-<digits>.safetensors" is taken off the end), so distinct
// stems give distinct names; stems are compared without regard to case, so this holds on file
// systems that fold case. The rest, manifest.json, config.json and rank-<digits>.json, are fixed
// names that none of these endings match.

#include "format/names.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <unordered_map>
#include <unordered_set>

namespace strandline::format {
namespace {

constexpr std::string_view kStepPrefix = "step-";
constexpr std::size_t kStepDigitsMin = 8;
constexpr std::string_view kPartialMark = "partial-";
constexpr std::string_view kReplacedMark = "replaced-";
constexpr std::string_view kDeletingMark = "deleting";

constexpr std::size_t kFileNameBytesMax = 255;   // Of Linux file systems.
constexpr std::size_t kFileStemBytesMax = 128;   // Leaves room for every ending, "~2" included.
constexpr std::string_view kTopGroup = "state";  // Of tensors without a top-level container.

bool is_file_name_byte(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
         c == '_' || c == '~' || c == '-';
}

std::string lower_case(std::string text) {
  for (char& c : text) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return text;
}

std::string key_text(const Key& key) {
  const auto* text = key.get_if<std::string>();
  return text != nullptr ? *text : key.text();
}

// The key of a node as text; an OrderedDict's `_metadata` is called that.
std::string node_text(const Structure::Node& node) {
  return node.metadata ? "_metadata" : key_text(node.key);
}

// A file stem for a text: one '_' for each character that file names cannot have, also for a
// leading dot, and for a text that has none at all.
std::string file_stem(std::string_view text) {
  std::string stem;
  for (const char c : text) {
    const bool continues_character = (static_cast<unsigned char>(c) & 0xc0) == 0x80;
    if (continues_character) continue;
    stem += is_file_name_byte(c) && !(c == '.' && stem.empty()) ? c : '_';
    if (stem.size() == kFileStemBytesMax) break;
  }
  return stem.empty() ? "_" : stem;
}

enum class Case : std::uint8_t { kMatters, kIgnored };

// Gives out names, each only once: the first who asks for `a` gets it, the next gets `a~2`.
class DistinctNames {
 public:
  explicit DistinctNames(Case letter_case) : case_(letter_case) {}

  std::string claim(const std::string& wanted) {
    if (taken_.insert(identity(wanted)).second) return wanted;
    // The counter makes many askers of one name cost one step each.
    std::uint64_t& number = next_number_.try_emplace(identity(wanted), 2).first->second;
    for (;; ++number) {
      std::string name = fmt::format("{}~{}", wanted, number);
      if (taken_.insert(identity(name)).second) return name;
    }
  }

 private:
  [[nodiscard]] std::string identity(const std::string& name) const {
    return case_ == Case::kIgnored ? lower_case(name) : name;
  }

  Case case_;
  std::unordered_set<std::string> taken_;
  std::unordered_map<std::string, std::uint64_t> next_number_;
};

// The top-level node over each tensor, which is the tensor itself where it stands at the top.
std::vector<std::uint32_t> top_nodes(const Structure& structure) {
  std::vector<std::uint32_t> tops;
  const auto& nodes = structure.nodes();
  std::uint32_t top = 1;
  for (const Structure::Tensor& tensor : structure.tensors()) {
    while (nodes[top].end <= tensor.node) top = nodes[top].end;
    tops.push_back(top);
  }
  return tops;
}

std::string label_text(const Structure& structure, std::uint32_t node, std::uint32_t below) {
  std::vector<std::uint32_t> way;  // From the tensor up.
  for (; node != below; node = structure.nodes()[node].parent) way.push_back(node);
  std::string label;
  for (auto i = way.rbegin(); i != way.rend(); ++i) {
    if (i != way.rbegin()) label += '.';
    label += node_text(structure.nodes()[*i]);
  }
  std::replace(label.begin(), label.end(), '\0', '_');
  return label.empty() ? "_" : label;
}

// Groups without names: by top-level node, or one for all. A tensor at the top belongs to the group
// of the root, node 0.
struct NodeGroup {
  std::uint32_t node = 0;
  std::vector<std::uint32_t> tensors;
};

std::vector<NodeGroup> node_groups(const Structure& structure) {
  const std::vector<std::uint32_t> tops = top_nodes(structure);
  std::vector<NodeGroup> groups;
  std::unordered_map<std::uint32_t, std::size_t> index_of_node;
  for (std::uint32_t tensor = 0; tensor < tops.size(); ++tensor) {
    const bool at_top = structure.tensors()[tensor].node == tops[tensor];
    const std::uint32_t node = at_top ? 0 : tops[tensor];
    const auto [position, added] = index_of_node.try_emplace(node, groups.size());
    if (added) groups.push_back({.node = node, .tensors = {}});
    groups[position->second].tensors.push_back(tensor);
  }
  if (groups.size() <= kGroupsMax) return groups;
  NodeGroup all;
  for (std::uint32_t tensor = 0; tensor < tops.size(); ++tensor) all.tensors.push_back(tensor);
  return {std::move(all)};
}

}  // namespace

std::string step_directory_name(std::int64_t step) {
  return fmt::format("{}{:0{}}", kStepPrefix, step, kStepDigitsMin);
}

std::optional<std::int64_t> parse_step_directory_name(std::string_view name) {
  if (!name.starts_with(kStepPrefix)) return std::nullopt;
  const std::string_view digits = name.substr(kStepPrefix.size());
  std::int64_t step = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), step);
  if (error != std::errc() || step < 0) return std::nullopt;
  // One name for each step: no sign, no missing or extra zeros, nothing behind.
  if (step_directory_name(step) != name) return std::nullopt;
  return step;
}

std::string partial_directory_name(std::string_view final_name, std::string_view run) {
  return fmt::format(".{}.{}{}", final_name, kPartialMark, run);
}

DirectoryName parse_directory_name(std::string_view name) {
  if (parse_step_directory_name(name)) {
    return {.kind = DirectoryName::Kind::kStep, .final_name = std::string(name), .id = {}};
  }
  // Ids hold no dot, so the last one separates the mark from a final name that may hold any.
  const std::size_t dot = name.rfind('.');
  if (!name.starts_with('.') || dot == std::string_view::npos || dot < 2) return {};
  const std::string final_name(name.substr(1, dot - 1));
  const std::string_view mark = name.substr(dot + 1);
  if (mark == kDeletingMark) {
    return {.kind = DirectoryName::Kind::kDeleting, .final_name = final_name, .id = {}};
  }
  if (mark.starts_with(kPartialMark) && mark.size() > kPartialMark.size()) {
    return {.kind = DirectoryName::Kind::kPartial,
            .final_name = final_name,
            .id = std::string(mark.substr(kPartialMark.size()))};
  }
  if (mark.starts_with(kReplacedMark) && mark.size() > kReplacedMark.size()) {
    return {.kind = DirectoryName::Kind::kReplaced,
            .final_name = final_name,
            .id = std::string(mark.substr(kReplacedMark.size()))};
  }
  return {};
}

bool is_file_name(std::string_view name) {
  return !name.empty() && name.size() <= kFileNameBytesMax && !name.starts_with('.') &&
         std::all_of(name.begin(), name.end(), is_file_name_byte);
}

std::string shard_file_name(std::string_view group, std::uint32_t part, std::uint32_t parts) {
  return fmt::format("{}-{:05}-of-{:05}.safetensors", group, part, parts);
}

std::string rank_file_name(std::uint32_t rank) { return fmt::format("rank-{:05}.json", rank); }

std::string index_file_name(std::string_view group) {
  return fmt::format("{}.safetensors.index.json", group);
}

Grouping group_tensors(const Structure& structure) {
  Grouping grouping;
  grouping.names.resize(structure.tensors().size());
  DistinctNames stems(Case::kIgnored);
  Grouping::Group* top_group = nullptr;
  std::vector<NodeGroup> groups = node_groups(structure);
  grouping.groups.reserve(groups.size());
  for (NodeGroup& group : groups) {
    // "__metadata__" means something else in a safetensors header.
    DistinctNames labels(Case::kMatters);
    labels.claim("__metadata__");
    for (const std::uint32_t tensor : group.tensors) {
      const std::uint32_t node = structure.tensors()[tensor].node;
      grouping.names[tensor] = labels.claim(label_text(structure, node, group.node));
    }
    Grouping::Group& named = grouping.groups.emplace_back();
    named.tensors = std::move(group.tensors);
    if (group.node == 0) {
      named.key = kTopGroup;
      top_group = &named;
    } else {
      named.key = node_text(structure.nodes()[group.node]);
      named.file_stem = stems.claim(file_stem(named.key));
    }
  }
  // Last, so that a key of the user's own called `state` keeps its name.
  if (top_group != nullptr) top_group->file_stem = stems.claim(std::string(kTopGroup));
  return grouping;
}

}  // namespace strandline::format
