#include "memory/range_lock.h"

#include <fcntl.h>

#include <cerrno>

namespace strandline::memory {
namespace {

int set_lock(int fd, short type, std::uint64_t offset, std::uint64_t bytes) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(offset);
  lock.l_len = static_cast<off_t>(bytes);
  if (::fcntl(fd, F_OFD_SETLK, &lock) == 0) return 0;
  return errno == EACCES ? EAGAIN : errno;  // POSIX allows either for the same thing.
}

}  // namespace

int lock_range(int fd, RangeLock lock, std::uint64_t offset, std::uint64_t bytes) {
  return set_lock(fd, lock == RangeLock::kShared ? F_RDLCK : F_WRLCK, offset, bytes);
}

void unlock_range(int fd, std::uint64_t offset, std::uint64_t bytes) {
  static_cast<void>(set_lock(fd, F_UNLCK, offset, bytes));
}

}  // namespace strandline::memory
