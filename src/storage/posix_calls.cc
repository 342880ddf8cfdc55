#include "storage/posix_calls.h"

#include <dirent.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

#include "base/result_macros.h"
#include "base/system_error.h"

namespace strandline::storage {
namespace {

static_assert(sizeof(off_t) == sizeof(std::int64_t), "files beyond 2 GiB need 64-bit offsets");

// Something may put files into a directory while it is emptied (NFS keeps an open file as
// ".nfs…"): look again this often, then report.
constexpr int kEmptyAttemptsMax = 3;

struct CloseDirectory {
  void operator()(DIR* stream) const { ::closedir(stream); }
};

// The range as the system calls want it.
Status check_range(std::uint64_t offset, std::size_t bytes, const std::string& path) {
  constexpr auto kOffsetMax = static_cast<std::uint64_t>(std::numeric_limits<off_t>::max());
  if (bytes <= kOffsetMax && offset <= kOffsetMax - bytes) return {};
  return failure(Error{.code = ErrorCode::kInvalidArgument,
                       .message = fmt::format("{} bytes at offset {} of '{}' lie beyond the "
                                              "largest possible file; correct the offset",
                                              bytes, offset, path),
                       .path = path});
}

Status empty_directory(int directory, const std::string& path, int depth) {
  STRANDLINE_ASSIGN_OR_RETURN(const std::vector<std::string> names,
                              list_directory(directory, path));
  for (const std::string& name : names) {
    STRANDLINE_RETURN_IF_ERROR(remove_tree(directory, name, path, depth + 1));
  }
  return {};
}

}  // namespace

Status write_all(int fd, std::uint64_t offset, std::span<const std::byte> bytes,
                 const std::string& path, WriteCall call) {
  STRANDLINE_RETURN_IF_ERROR(check_range(offset, bytes.size(), path));
  while (!bytes.empty()) {
    const std::size_t wanted = std::min(bytes.size(), kTransferBytesMax);
    const ssize_t written =
        uninterrupted([&] { return call(fd, bytes.data(), wanted, static_cast<off_t>(offset)); });
    if (written < 0) return failure(base::system_error("write", path, errno));
    // A device that takes nothing and names no error would keep this loop busy for ever.
    if (written == 0) return failure(base::system_error("write", path, EIO));
    bytes = bytes.subspan(static_cast<std::size_t>(written));
    offset += static_cast<std::uint64_t>(written);
  }
  return {};
}

Status read_all(int fd, std::uint64_t offset, std::span<std::byte> bytes, const std::string& path,
                ReadCall call) {
  STRANDLINE_RETURN_IF_ERROR(check_range(offset, bytes.size(), path));
  const std::uint64_t end = offset + bytes.size();
  while (!bytes.empty()) {
    const std::size_t wanted = std::min(bytes.size(), kTransferBytesMax);
    const ssize_t got =
        uninterrupted([&] { return call(fd, bytes.data(), wanted, static_cast<off_t>(offset)); });
    if (got < 0) return failure(base::system_error("read", path, errno));
    if (got == 0) {
      return failure(Error{.code = ErrorCode::kCorrupt,
                           .message = fmt::format("'{}' ends at byte {} or before, but its bytes "
                                                  "up to {} are needed: it was cut short; use "
                                                  "another checkpoint",
                                                  path, offset, end),
                           .path = path});
    }
    bytes = bytes.subspan(static_cast<std::size_t>(got));
    offset += static_cast<std::uint64_t>(got);
  }
  return {};
}

Result<base::UniqueFd> open_at(int directory, const std::string& name, int flags,
                               std::string_view operation, const std::string& path) {
  // The mode of new files; the user's umask takes from it what the user does not want.
  constexpr mode_t kFileMode = 0666;
  base::UniqueFd fd(
      uninterrupted([&] { return ::openat(directory, name.c_str(), flags, kFileMode); }));
  if (!fd) return failure(base::system_error(operation, path, errno));
  return fd;
}

Result<std::vector<std::string>> list_directory(int directory, const std::string& path) {
  // A second descriptor: the position in the listing belongs to the open file, and several threads
  // may list through the same directory.
  STRANDLINE_ASSIGN_OR_RETURN(base::UniqueFd own,
                              open_at(directory, ".", kOpenDirectory, "list", path));
  const std::unique_ptr<DIR, CloseDirectory> stream(::fdopendir(own.get()));
  if (!stream) return failure(base::system_error("list", path, errno));
  static_cast<void>(own.release());  // closedir() closes it.
  std::vector<std::string> names;
  while (true) {
    errno = 0;
    const dirent* entry = ::readdir(stream.get());
    if (entry == nullptr) break;
    const std::string_view name = entry->d_name;
    if (name != "." && name != "..") names.emplace_back(name);
  }
  if (errno != 0) return failure(base::system_error("list", path, errno));
  std::sort(names.begin(), names.end());
  return names;
}

Status sync_descriptor(int fd, const std::string& path) {
  if (uninterrupted([&] { return ::fsync(fd); }) != 0) {
    return failure(base::system_error("sync", path, errno));
  }
  return {};
}

bool is_same_file(int directory, const std::string& name, int fd) {
  struct stat named {};
  struct stat open {};
  return ::fstatat(directory, name.c_str(), &named, AT_SYMLINK_NOFOLLOW) == 0 &&
         ::fstat(fd, &open) == 0 && named.st_dev == open.st_dev && named.st_ino == open.st_ino;
}

Status remove_tree(int directory, const std::string& name, const std::string& path, int depth) {
  const std::string full = path + '/' + name;
  const auto is_gone = [](int error) { return error == ENOENT; };
  struct stat found {};
  if (::fstatat(directory, name.c_str(), &found, AT_SYMLINK_NOFOLLOW) != 0) {
    if (is_gone(errno)) return {};
    return failure(base::system_error("remove", full, errno));
  }
  if (!S_ISDIR(found.st_mode)) {
    if (::unlinkat(directory, name.c_str(), 0) == 0 || is_gone(errno)) return {};
    return failure(base::system_error("remove", full, errno));
  }
  if (depth >= kRemoveDepthMax) {
    return failure(Error{.code = ErrorCode::kIo,
                         .message = fmt::format("'{}' is not removed: directories lie more than "
                                                "{} deep there, which no checkpoint has; remove "
                                                "it by hand",
                                                full, kRemoveDepthMax),
                         .path = full});
  }
  for (int attempt = 1;; ++attempt) {
    if (Result<base::UniqueFd> opened = open_at(directory, name, kOpenDirectory, "remove", full)) {
      Status emptied = empty_directory(opened->get(), full, depth);
      if (!emptied && !is_gone(emptied.error().system_errno)) return emptied;
    } else if (!is_gone(opened.error().system_errno)) {
      return failure(std::move(opened).error());
    }
    if (::unlinkat(directory, name.c_str(), AT_REMOVEDIR) == 0 || is_gone(errno)) return {};
    const bool refilled = errno == ENOTEMPTY || errno == EEXIST;
    if (!refilled || attempt == kEmptyAttemptsMax) {
      // Said as ENOTEMPTY: EEXIST would read as "already exists".
      return failure(base::system_error("remove", full, refilled ? ENOTEMPTY : errno));
    }
  }
}

Status check_entry_name(std::string_view name, const std::string& path) {
  const bool is_entry = !name.empty() && name != "." && name != ".." &&
                        name.find('/') == std::string_view::npos &&
                        name.find('\0') == std::string_view::npos;
  if (is_entry) return {};
  return failure(Error{.code = ErrorCode::kInvalidArgument,
                       .message = fmt::format("'{}' cannot name an entry of '{}': give a name "
                                              "without '/' that is not empty, '.' or '..'",
                                              name, path),
                       .path = path});
}

}  // namespace strandline::storage
