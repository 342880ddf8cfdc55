// Locks on ranges of a memory file, which tell the processes that map it who still uses what.
#pragma once

#include <cstdint>

namespace strandline::memory {

enum class RangeLock {
  kShared,     // Others may have it too.
  kExclusive,  // Nobody else has any.
};

// Takes or changes the lock of this open file description (not of the descriptor or the process).
// It ends when the last descriptor of the description is closed, also by the process's death. Does
// not wait. Returns 0, or the errno: EAGAIN where another description's lock is in the way.
// Thread-safe.
[[nodiscard]] int lock_range(int fd, RangeLock lock, std::uint64_t offset, std::uint64_t bytes);

void unlock_range(int fd, std::uint64_t offset, std::uint64_t bytes);

}  // namespace strandline::memory
