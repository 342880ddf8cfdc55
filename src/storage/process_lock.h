// A lock on a file or directory that this process holds and its forked children do not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "strandline/error.h"

namespace strandline::storage {

// Locks that one process holds at a time. Each open Checkpointer holds one and each save two more
// for a moment, so that this many mean a leak; the table must have a fixed size because it is read
// between fork and the child's first instruction.
inline constexpr std::size_t kProcessLocksMax = 256;

// An exclusive flock(2), released by its destructor or by the process's death. Another lock on the
// same file conflicts, in this process too. Thread-safety: single-threaded once acquired.
class ProcessLock {
 public:
  // Opens `name` in `directory` with `flags` (O_CLOEXEC is added) and locks it without waiting.
  // Empty if somebody else holds the lock. `path` is for messages. Fails with kUnavailable if this
  // process holds kProcessLocksMax locks already, else as the system says; see is_unsupported().
  [[nodiscard]] static Result<std::optional<ProcessLock>> try_acquire(int directory,
                                                                      const std::string& name,
                                                                      int flags,
                                                                      std::string_view path);

  // Whether an error of try_acquire() means that the file system has no locks.
  [[nodiscard]] static bool is_unsupported(const Error& error);

  ProcessLock(ProcessLock&& other) noexcept;
  ProcessLock& operator=(ProcessLock&& other) noexcept;
  ~ProcessLock();

  // The locked file's descriptor, owned by the lock.
  [[nodiscard]] int descriptor() const { return fd_; }

 private:
  explicit ProcessLock(int fd);
  void release();

  int fd_;  // -1 once moved from.
  std::uint64_t fork_generation_;
};

}  // namespace strandline::storage
