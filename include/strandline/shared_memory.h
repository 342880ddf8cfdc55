/// @file
/// Handing staged memory to another process of the same user on the same machine, without copying
/// it and with one descriptor for everything that one stager has staged.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "strandline/error.h"
#include "strandline/export.h"
#include "strandline/state_dict.h"

namespace strandline::inline v0 {

/// Where a range of shared staged memory is. Plain data: send its members in any way.
struct SharedRange {
  std::int64_t pid = 0;          ///< The process that has it open; it must live until attach().
  int descriptor = -1;           ///< There.
  std::string slab;              ///< 32 hex digits that tell this memory from any other.
  std::uint64_t generation = 0;  ///< The staging that it belongs to.
  std::uint64_t offset = 0;      ///< In the memory file, in bytes.
  std::uint64_t bytes = 0;
};

/// Shared memory of another process (or of this one), mapped readable and writable.
struct AttachedMemory {
  std::byte* data = nullptr;
  std::uint64_t bytes = 0;
  std::shared_ptr<const void> keep_alive;  ///< As long as it exists, nothing else is staged there.
};

/// Describes `bytes` at `data`, at least one, which must lie in a result staged with `share_memory`
/// (or in what attach() gave). Until it was attached, for at most a minute, the memory is kept
/// although its last holder here may be gone; each description counts for one attach(). Fails with
/// kInvalidArgument for other memory, such as what a forked child inherited: its parent shares
/// that. Thread-safe; does not block.
[[nodiscard]] STRANDLINE_EXPORT Result<SharedRange> share(const std::byte* data,
                                                          std::uint64_t bytes);

/// Maps a range that share() described. Ranges of one slab share one descriptor, and of one
/// generation one mapping; in the process that staged it, it is the staged memory itself. Fails
/// with kNotFound where the process has ended or closed it, or the memory was used for something
/// else since; kInvalidArgument where the range makes no sense, kCorrupt where the memory describes
/// itself wrongly, kUnsupported where another version does so, kIo and kMemoryLimit where the
/// system refuses. Whoever can send ranges is trusted with what this user may do anyway, not with
/// more: no range makes this process block, change another file, or leave the memory that it names.
/// Thread-safe; blocks for some system calls.
[[nodiscard]] STRANDLINE_EXPORT Result<AttachedMemory> attach(const SharedRange& range);

}  // namespace strandline::inline v0
