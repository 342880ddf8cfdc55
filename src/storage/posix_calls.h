// The system calls that the POSIX storage makes, each once: interrupted calls are repeated, short
// transfers continued, errno turned into an Error that names what was done to which path.
//
// All paths in arguments are for messages only; the work is done relative to descriptors, so that
// a directory renamed meanwhile stays the one that was opened.
#pragma once

#include <fcntl.h>
#include <sys/types.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/unique_fd.h"
#include "strandline/error.h"

namespace strandline::storage {

// Linux transfers at most 0x7ffff000 bytes in one call and some network file systems less than
// 2 GiB; 1 GiB is below all of them and large enough to cost nothing.
inline constexpr std::size_t kTransferBytesMax = std::size_t{1} << 30;

// Directories within directories that remove_tree() follows, each of which holds a descriptor. A
// step is flat; only a foreign leftover has more than one level.
inline constexpr int kRemoveDepthMax = 32;

// How a directory is opened: never through a link, never inherited by a program that is started.
inline constexpr int kOpenDirectory = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;

// Calls `call` until it is not interrupted by a signal.
template <typename Call>
[[nodiscard]] auto uninterrupted(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

using WriteCall = ssize_t (*)(int, const void*, std::size_t, off_t);
using ReadCall = ssize_t (*)(int, void*, std::size_t, off_t);

// Writes all of `bytes` at `offset`. The call is a parameter for tests.
[[nodiscard]] Status write_all(int fd, std::uint64_t offset, std::span<const std::byte> bytes,
                               const std::string& path, WriteCall call = ::pwrite);

// Fills `bytes` from `offset`. Fails with kCorrupt where the file ends before.
[[nodiscard]] Status read_all(int fd, std::uint64_t offset, std::span<std::byte> bytes,
                              const std::string& path, ReadCall call = ::pread);

[[nodiscard]] Result<base::UniqueFd> open_at(int directory, const std::string& name, int flags,
                                             std::string_view operation, const std::string& path);

// Names of everything in a directory but "." and "..", sorted.
[[nodiscard]] Result<std::vector<std::string>> list_directory(int directory,
                                                              const std::string& path);

// fsync of a file or a directory.
[[nodiscard]] Status sync_descriptor(int fd, const std::string& path);

// Whether `name` in `directory` is what `fd` is open on.
[[nodiscard]] bool is_same_file(int directory, const std::string& name, int fd);

// Removes a file, a link (never what it points to) or a directory with all that is in it. Missing
// is success, also where it goes missing meanwhile. `path` is that of `directory`.
[[nodiscard]] Status remove_tree(int directory, const std::string& name, const std::string& path,
                                 int depth = 0);

// Fails with kInvalidArgument unless `name` names an entry of a directory.
[[nodiscard]] Status check_entry_name(std::string_view name, const std::string& path);

}  // namespace strandline::storage
