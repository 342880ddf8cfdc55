// Directories of a POSIX storage.
//
// Both kinds hold a descriptor of their directory from the beginning and do all work relative to
// it. For the one being written this means that nobody can slip another directory under it; for the
// one being read, that it stays the same step when another process exchanges the step for a newer
// one under the same name. What a descriptor cannot do is keep the *files* of a step that is being
// removed: a file that was opened stays readable to its end, one that was not is gone and reported
// as kNotFound. The reader above then starts again from the newest step.
//
// Files are opened without following links, without blocking on a planted pipe, and only plain
// files are read: a checkpoint from a stranger must not make its reader hang or read elsewhere.
//
// In a forked child the destructor of a partial directory does nothing: the directory is the
// parent's, which still writes it.

#include "storage/posix_directory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/fork.h"
#include "base/result_macros.h"
#include "base/system_error.h"
#include "storage/posix_calls.h"
#include "storage/posix_file.h"

namespace strandline::storage {

PosixPartialDirectory::PosixPartialDirectory(Place place)
    : place_(std::move(place)), fork_generation_(base::fork_generation()) {}

PosixPartialDirectory::~PosixPartialDirectory() {
  if (published_ || belongs_to_parent_process()) return;
  // The name may be somebody else's by now, if this directory was moved away by hand.
  if (!is_same_file(place_.root.get(), place_.name, place_.directory.get())) return;
  // What cannot be removed now is a leftover that the next writer sweeps.
  static_cast<void>(remove_tree(place_.root.get(), place_.name, place_.root_path));
}

Result<std::unique_ptr<WritableFile>> PosixPartialDirectory::create(std::string_view name,
                                                                    std::uint64_t bytes) {
  STRANDLINE_RETURN_IF_ERROR(check_entry_name(name, path()));
  return PosixWritableFile::create(place_.directory.get(), std::string(name), bytes,
                                   fmt::format("{}/{}", path(), name));
}

Result<std::vector<std::string>> PosixPartialDirectory::list() {
  return list_directory(place_.directory.get(), path());
}

bool PosixPartialDirectory::belongs_to_parent_process() const {
  return base::fork_generation() != fork_generation_;
}

PosixReadableDirectory::PosixReadableDirectory(base::UniqueFd directory, std::string path)
    : directory_(std::move(directory)), path_(std::move(path)) {}

Result<std::vector<std::string>> PosixReadableDirectory::list() {
  return list_directory(directory_.get(), path_);
}

Result<std::uint64_t> PosixReadableDirectory::file_bytes(std::string_view name) {
  STRANDLINE_ASSIGN_OR_RETURN(const std::shared_ptr<const base::UniqueFd> fd, open_file(name));
  struct stat found {};
  if (::fstat(fd->get(), &found) != 0) {
    return failure(base::system_error("examine", fmt::format("{}/{}", path_, name), errno));
  }
  return static_cast<std::uint64_t>(found.st_size);
}

Status PosixReadableDirectory::read_at(std::string_view name, std::uint64_t offset,
                                       std::span<std::byte> bytes) {
  STRANDLINE_ASSIGN_OR_RETURN(const std::shared_ptr<const base::UniqueFd> fd, open_file(name));
  // Outside the mutex: another thread may meanwhile push the file out of the table, but not close
  // what is shared here.
  return read_all(fd->get(), offset, bytes, fmt::format("{}/{}", path_, name));
}

Result<std::shared_ptr<const base::UniqueFd>> PosixReadableDirectory::open_file(
    std::string_view name) {
  base::MutexLock lock(mutex_);
  const auto known = std::find_if(open_files_.begin(), open_files_.end(),
                                  [&](const OpenFile& file) { return file.name == name; });
  if (known != open_files_.end()) {
    std::rotate(known, known + 1, open_files_.end());
    return open_files_.back().fd;
  }

  STRANDLINE_RETURN_IF_ERROR(check_entry_name(name, path_));
  const std::string path = fmt::format("{}/{}", path_, name);
  const auto not_plain = [&path] {
    return failure(
        Error{.code = ErrorCode::kNotFound,
              .message = fmt::format("'{}' is not a plain file, and no other is read", path),
              .path = path});
  };
  // Looked at before it is opened, since opening a device or a pipe may already do something. The
  // look after opening is the one that counts.
  struct stat found {};
  if (::fstatat(directory_.get(), std::string(name).c_str(), &found, AT_SYMLINK_NOFOLLOW) == 0 &&
      !S_ISREG(found.st_mode)) {
    return not_plain();
  }
  constexpr int kFlags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
  STRANDLINE_ASSIGN_OR_RETURN(base::UniqueFd fd,
                              open_at(directory_.get(), std::string(name), kFlags, "open", path));
  if (::fstat(fd.get(), &found) != 0) {
    return failure(base::system_error("examine", path, errno));
  }
  if (!S_ISREG(found.st_mode)) return not_plain();

  if (open_files_.size() >= kOpenFilesMax) open_files_.erase(open_files_.begin());
  open_files_.push_back({std::string(name), std::make_shared<const base::UniqueFd>(std::move(fd))});
  return open_files_.back().fd;
}

}  // namespace strandline::storage
