// Where every byte of a state goes: the pure part of staging.
//
// A plan follows from the state's structure, its strides and its alias pattern (which leaf lies at
// which offset of which other leaf), and from the layout. It holds no pointer, so nothing in it can
// go stale when storages are freed, swapped or re-used.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "strandline/error.h"
#include "strandline/state_dict.h"

namespace strandline::staging {

// How staged bytes are laid out.
enum class Layout : std::uint8_t {
  kFile,  // The bytes of complete safetensors files, headers included, tensors row-major.
};

// A tensor whose bytes are stored, at an offset of its file's data section.
struct PlacedTensor {
  std::uint32_t tensor = 0;  // Index in Structure::tensors().
  std::string name;          // In the shard.
  std::uint64_t offset = 0;  // In the data section.
  std::uint64_t bytes = 0;
};

struct FilePlan {
  std::string group;  // The top-level key.
  std::string name;
  std::string index_name;             // Of the group's Hugging Face index.
  std::string header;                 // Everything before the data section.
  std::vector<PlacedTensor> tensors;  // Descending element size, then tree order; no gaps.
  std::uint64_t data_bytes = 0;

  [[nodiscard]] std::uint64_t file_bytes() const { return header.size() + data_bytes; }
};

// Where one tensor of the state is: stored, or an alias of a stored tensor of the same file.
struct Placement {
  std::uint32_t file = 0;
  std::uint32_t index = 0;                // In FilePlan::tensors; of an alias, its owner's.
  std::optional<std::uint32_t> alias_of;  // Index in Structure::tensors(); never itself an alias.
  std::uint64_t alias_offset_bytes = 0;
};

struct Plan {
  Layout layout = Layout::kFile;
  std::vector<FilePlan> files;
  std::vector<Placement> placements;  // One per tensor of the structure.

  [[nodiscard]] std::uint64_t data_bytes() const;  // Of all files, headers not counted.
  [[nodiscard]] std::uint64_t file_bytes() const;  // Headers counted.
};

// Checks every view (kInvalidArgument or kUnsupported with the tensor's key path) and lays the
// state out. Within a group a tensor that equals another's bytes, or is a row-major sub-range of
// them at a multiple of its element size, becomes an alias; everything else is stored in full, and
// so are tensors without elements. A state without tensors has no files. Devices are not looked at
// but for telling memories apart. Pure; O(n log n) in the tensors.
[[nodiscard]] Result<std::shared_ptr<const Plan>> plan_files(const StateDict& state);

}  // namespace strandline::staging
