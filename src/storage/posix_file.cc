// A file of a step: created anew, written by position, synced once.
//
// What each step protects against:
// - O_EXCL: writing into what a dead run left there. What is committed is what this run wrote.
// - fallocate: finding out after minutes of writing that the disk is full. The size of the file
//   stays 0 until bytes are written (FALLOC_FL_KEEP_SIZE), so that a file that was not written to
//   its end is short, which readers notice, rather than full of zeros.
// - fsync rather than fdatasync: the file is new, so its inode has to go to the disk in any case
//   and fdatasync would save nothing; fsync does not depend on what a file system counts among the
//   "metadata needed to read the data".
// - The first error is kept. After a failed fsync Linux marks the pages clean, so a second fsync
//   succeeds although the data are lost; and a file with a failed write is not made good by a sync.
// - close: NFS and quotas report there what they could not report before. sync() closes, because a
//   destructor could not say so, and because a step of many files should not hold a descriptor for
//   each until it is published.

#include "storage/posix_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <limits>
#include <utility>

#include "base/result_macros.h"
#include "base/system_error.h"
#include "storage/posix_calls.h"

namespace strandline::storage {
namespace {

// Gives the file its space. File systems that cannot are asked nothing: they report a full disk at
// the write.
Status reserve(int fd, std::uint64_t bytes, const std::string& path) {
  constexpr auto kBytesMax = static_cast<std::uint64_t>(std::numeric_limits<off_t>::max());
  if (bytes < kReserveBytesMin || bytes > kBytesMax) return {};
  const int result = uninterrupted(
      [&] { return ::fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, static_cast<off_t>(bytes)); });
  if (result == 0 || errno == EOPNOTSUPP || errno == ENOSYS) return {};
  return failure(base::system_error(fmt::format("reserve {} bytes for", bytes), path, errno));
}

}  // namespace

Result<std::unique_ptr<WritableFile>> PosixWritableFile::create(int directory,
                                                                const std::string& name,
                                                                std::uint64_t bytes,
                                                                std::string path) {
  constexpr int kFlags = O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC;
  STRANDLINE_ASSIGN_OR_RETURN(base::UniqueFd fd,
                              open_at(directory, name, kFlags, "create file", path));
  STRANDLINE_RETURN_IF_ERROR(reserve(fd.get(), bytes, path));
  return std::make_unique<PosixWritableFile>(std::move(fd), std::move(path));
}

PosixWritableFile::PosixWritableFile(base::UniqueFd fd, std::string path)
    : path_(std::move(path)), fd_(std::move(fd)) {}

void PosixWritableFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes,
                                 Completion done) {
  if (!fd_) {
    done(
        failure(Error{.code = ErrorCode::kInvalidArgument,
                      .message = fmt::format("'{}' was synced already; write before sync()", path_),
                      .path = path_}));
    return;
  }
  done(remember(write_all(fd_.get(), offset, bytes, path_)));
}

Status PosixWritableFile::sync() {
  if (fd_) {
    const int fd = fd_.release();
    Status status = sync_descriptor(fd, path_);
    // Never repeated: Linux frees the number even when close() reports an error.
    if (::close(fd) != 0 && status) status = failure(base::system_error("close", path_, errno));
    static_cast<void>(remember(std::move(status)));
  }
  base::MutexLock lock(mutex_);
  if (first_error_) return failure(*first_error_);
  return {};
}

Status PosixWritableFile::remember(Status status) {
  base::MutexLock lock(mutex_);
  if (!status && !first_error_) first_error_ = status.error();
  return status;
}

}  // namespace strandline::storage
