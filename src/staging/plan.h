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
  kFile,     // The bytes of complete safetensors files, headers included, tensors row-major.
  kStorage,  // One extent per source storage, in one range of memory without a header.
};

// A tensor whose bytes are stored, at an offset of its file's data section. With kStorage an
// extent: the bytes of a storage that its tensors reach.
struct PlacedTensor {
  std::uint32_t tensor = 0;  // Index in Structure::tensors(); of an extent, its first tensor's.
  std::string name;          // In the shard; of an extent empty.
  std::uint64_t offset = 0;  // In the data section.
  std::uint64_t bytes = 0;
};

struct FilePlan {
  std::string group;  // The top-level key.
  std::string name;
  std::string index_name;  // Of the group's Hugging Face index.
  std::string header;      // Everything before the data section.
  // Descending element size, then tree order; no gaps. Extents: in the order of their first
  // tensors, each at a multiple of kExtentAlignmentBytes.
  std::vector<PlacedTensor> tensors;
  std::uint64_t data_bytes = 0;

  [[nodiscard]] std::uint64_t file_bytes() const { return header.size() + data_bytes; }
};

// Where one tensor of the state is (kFile): stored, or an alias of a stored tensor of the same
// file.
struct Placement {
  std::uint32_t file = 0;
  std::uint32_t index = 0;                // In FilePlan::tensors; of an alias, its owner's.
  std::optional<std::uint32_t> alias_of;  // Index in Structure::tensors(); never itself an alias.
  std::uint64_t alias_offset_bytes = 0;
};

// Where one tensor of the state is (kStorage).
struct ExtentPlace {
  std::optional<std::uint32_t> extent;  // In FilePlan::tensors. None: no byte of it is staged.
  std::uint64_t offset_bytes = 0;       // Of the element at index 0, 0, …, in the extent.
};

// Extents begin at multiples of this: no type needs more, and vector units read it at once.
inline constexpr std::uint64_t kExtentAlignmentBytes = 64;

struct Plan {
  Layout layout = Layout::kFile;
  std::vector<FilePlan> files;        // With kStorage at most one.
  std::vector<Placement> placements;  // kFile: one per tensor of the structure.
  std::vector<ExtentPlace> places;    // kStorage: one per tensor of the structure.

  [[nodiscard]] std::uint64_t data_bytes() const;  // Of all files, headers not counted.
  [[nodiscard]] std::uint64_t file_bytes() const;  // Headers counted.
};

// Checks every view (kInvalidArgument or kUnsupported with the tensor's key path) and lays the
// state out. Within a group a tensor that equals another's bytes, or is a row-major sub-range of
// them at a multiple of its element size, becomes an alias; everything else is stored in full, and
// so are tensors without elements. A state without tensors has no files. Devices are not looked at
// but for telling memories apart. Pure; O(n log n) in the tensors.
[[nodiscard]] Result<std::shared_ptr<const Plan>> plan_files(const StateDict& state);

// A plan with kStorage and, because it knows no pointers, what its extents are copied from.
struct StoragePlan {
  std::shared_ptr<const Plan> plan;
  // One view of bytes per extent; it keeps alive what the tensors that reach the storage do.
  std::vector<TensorView> extents;
};

// Checks every view as plan_files() does and lays out the storages that they lie in: one extent per
// device and storage base, which is all that the tensors reach, from the first byte to the last. If
// that is the whole storage, tensors lie at the offsets that they have in it. Otherwise the extent
// begins with the first byte reached, or up to 15 bytes before it, so that every element lies at a
// multiple of its size if it did in the storage. Pure; O(n) in the tensors.
[[nodiscard]] Result<StoragePlan> plan_storages(const StateDict& state);

}  // namespace strandline::staging
