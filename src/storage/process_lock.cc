// Locks that do not outlive their process in its children.
//
// Problem. A flock(2) belongs to an open file, and fork(2) gives the child another descriptor of
// the same open file: the lock is released only when all descriptors of it are closed. A trainer
// that is killed while its data loading workers live on (they notice seconds later, or never)
// would keep its directory locked, and the restarted trainer would be refused. O_CLOEXEC does not
// help, since those workers never call exec. Record locks of fcntl(2) are not inherited, but they
// are dropped when the process closes *any* descriptor of the file and do not conflict within one
// process; "open file description" locks are inherited like flock.
//
// Approach. Every locked descriptor stands in a table of fixed size, and a handler that runs in the
// child right after fork closes them all. A close in the child leaves the parent's lock alone.
// Opening, locking and entering the table happen under one mutex, which fork takes as well: so no
// child can inherit a descriptor that is not in the table yet, nor close one that is being closed
// and whose number may be another file's by then.
//
// Concurrency. While the mutex is held only system calls run, never malloc: a memory allocator has
// fork handlers and locks of its own, and taking the two in both orders would be a deadlock.
//
// Life cycle in a forked child. The ProcessLock objects exist there as copies, their descriptors
// are closed and the numbers free for other files: the destructor notices the fork and does
// nothing. Children made without fork(3), by a bare clone(2), run no handlers; for them the
// destructor releases the lock itself (LOCK_UN) rather than by closing.

#include "storage/process_lock.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <pthread.h>
#include <sys/file.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <utility>

#include "base/fork.h"
#include "base/mutex.h"
#include "base/system_error.h"
#include "storage/posix_calls.h"

namespace strandline::storage {
namespace {

struct Table {
  base::Mutex mutex;
  // Each a descriptor plus one; 0 is a free place.
  std::array<int, kProcessLocksMax> places STRANDLINE_GUARDED_BY(mutex){};
};
constinit Table table;

// The analysis cannot follow a mutex that one function locks and another unlocks.
#define STRANDLINE_ACROSS_FORK STRANDLINE_THREAD_ANNOTATION(no_thread_safety_analysis)

void before_fork() STRANDLINE_ACROSS_FORK { table.mutex.lock(); }

void after_fork_in_parent() STRANDLINE_ACROSS_FORK { table.mutex.unlock(); }

void after_fork_in_child() STRANDLINE_ACROSS_FORK {
  for (int& place : table.places) {
    if (place != 0) ::close(place - 1);
    place = 0;
  }
  table.mutex.unlock();
}

enum class Step : std::uint8_t { kLocked, kHeld, kOpenFailed, kLockFailed, kTableFull };

struct Attempt {
  Step step = Step::kLocked;
  int fd = -1;
  int error = 0;
};

// No allocation in here: see above.
Attempt open_and_lock(int directory, const char* name, int flags) {
  constexpr mode_t kFileMode = 0666;
  base::MutexLock lock(table.mutex);
  int* free_place = nullptr;
  for (int& place : table.places) {
    if (place == 0) free_place = &place;
  }
  if (free_place == nullptr) return {.step = Step::kTableFull};
  const int fd =
      uninterrupted([&] { return ::openat(directory, name, flags | O_CLOEXEC, kFileMode); });
  if (fd < 0) return {.step = Step::kOpenFailed, .error = errno};
  if (uninterrupted([&] { return ::flock(fd, LOCK_EX | LOCK_NB); }) != 0) {
    const int error = errno;
    ::close(fd);
    return {.step = error == EWOULDBLOCK ? Step::kHeld : Step::kLockFailed, .error = error};
  }
  *free_place = fd + 1;
  return {.step = Step::kLocked, .fd = fd};
}

void unlock_and_close(int fd) {
  base::MutexLock lock(table.mutex);
  for (int& place : table.places) {
    if (place == fd + 1) place = 0;
  }
  static_cast<void>(::flock(fd, LOCK_UN));
  ::close(fd);
}

}  // namespace

Result<std::optional<ProcessLock>> ProcessLock::try_acquire(int directory, const std::string& name,
                                                            int flags, std::string_view path) {
  [[maybe_unused]] static const int kRegistered =
      pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  const Attempt attempt = open_and_lock(directory, name.c_str(), flags);
  switch (attempt.step) {
    case Step::kLocked:
      return std::optional<ProcessLock>(ProcessLock(attempt.fd));
    case Step::kHeld:
      return std::optional<ProcessLock>();
    case Step::kOpenFailed:
      return failure(base::system_error("open", path, attempt.error));
    case Step::kLockFailed: {
      Error error = base::system_error("lock", path, attempt.error);
      if (is_unsupported(error)) {
        error.message +=
            "; this file system has no locks: mount it with locks (Lustre: option "
            "flock), or choose another directory";
      }
      return failure(std::move(error));
    }
    case Step::kTableFull:
      break;
  }
  return failure(Error{.code = ErrorCode::kUnavailable,
                       .message = fmt::format("cannot lock '{}': this process holds {} locks "
                                              "already; close what is not needed any more",
                                              path, kProcessLocksMax),
                       .path = std::string(path)});
}

bool ProcessLock::is_unsupported(const Error& error) {
  return error.system_errno == ENOSYS || error.system_errno == EOPNOTSUPP ||
         error.system_errno == ENOLCK;
}

ProcessLock::ProcessLock(int fd) : fd_(fd), fork_generation_(base::fork_generation()) {}

ProcessLock::ProcessLock(ProcessLock&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), fork_generation_(other.fork_generation_) {}

ProcessLock& ProcessLock::operator=(ProcessLock&& other) noexcept {
  if (this != &other) {
    release();
    fd_ = std::exchange(other.fd_, -1);
    fork_generation_ = other.fork_generation_;
  }
  return *this;
}

ProcessLock::~ProcessLock() { release(); }

void ProcessLock::release() {
  if (fd_ < 0 || base::fork_generation() != fork_generation_) return;
  unlock_and_close(fd_);
}

}  // namespace strandline::storage
