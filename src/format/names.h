// Every name that a step has on disk: directories, shards, tensors inside shards. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "strandline/state_dict.h"

namespace strandline::format {

// "step-00001200"; steps beyond eight digits take more. And back.
[[nodiscard]] std::string step_directory_name(std::int64_t step);
[[nodiscard]] std::optional<std::int64_t> parse_step_directory_name(std::string_view name);

// ".<final>.partial-<run>": being written. <final> is a step's directory name, or any name given to
// save(path). The storage makes two more: ".<final>.replaced-<id>", moved aside where it cannot
// exchange two directories, and ".<final>.deleting", being removed.
[[nodiscard]] std::string partial_directory_name(std::string_view final_name, std::string_view run);

// What a name at the top of a storage is.
struct DirectoryName {
  enum class Kind : std::uint8_t { kStep, kPartial, kReplaced, kDeleting, kOther };
  Kind kind = Kind::kOther;
  std::string final_name;  // For all but kOther.
  std::string id;          // The run or id, for kPartial and kReplaced.
};
[[nodiscard]] DirectoryName parse_directory_name(std::string_view name);

// Whether a name may stand for a file of a step: [A-Za-z0-9._~-]+, no leading dot, at most 255.
[[nodiscard]] bool is_file_name(std::string_view name);

[[nodiscard]] std::string shard_file_name(std::string_view group, std::uint32_t part,
                                          std::uint32_t parts);  // Both from 1.
[[nodiscard]] std::string rank_file_name(std::uint32_t rank);
[[nodiscard]] std::string index_file_name(std::string_view group);

// More groups than this are folded into one.
inline constexpr std::uint32_t kGroupsMax = 64;

// How the tensors of a state are spread over files, and what they are called there.
struct Grouping {
  struct Group {
    std::string key;        // The top-level key as text; "state" for tensors directly at the top.
    std::string file_stem;  // The same made a file name, distinct without regard to case.
    std::vector<std::uint32_t> tensors;  // In tree order.
  };
  std::vector<Group> groups;       // In tree order, without those that hold no tensor.
  std::vector<std::string> names;  // For each tensor, its name in the shard.
};

// Groups by top-level key; see docs/format.md for the rules on names and collisions.
[[nodiscard]] Grouping group_tensors(const Structure& structure);

}  // namespace strandline::format
