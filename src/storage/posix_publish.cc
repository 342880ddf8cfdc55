// The commit point on a POSIX file system.
//
// Problem. A directory of many files has to appear under its final name all at once, whatever
// happens meanwhile: a crash of the process, a power cut, another process looking. POSIX has one
// operation that is atomic for observers, rename, and one that is durable, fsync; neither is both.
//
// Order, and what each step protects against:
//   1. (before) fsync of every file. Without it a power cut leaves the names with empty files.
//   2. fsync of the partial directory. Without it the step may appear with some names missing.
//   3. rename to the final name. Before it readers see nothing of the step, after it all of it.
//   4. fsync of the root. Without it a power cut undoes the rename: the step is lost although
//      somebody was told that it is safe.
//   5. only then removal of what was replaced. Done before 4, a power cut could bring back the old
//      directory under its final name with its files gone: neither the old step nor the new one.
// If 2 or 3 fails nothing has changed. If 4 fails the step is visible and complete but may vanish
// in a power cut; renaming it back would make nothing better, so that is reported as it is, and
// what was replaced is left where it lies, under a name that the next writer sweeps.
//
// Replacing. RENAME_EXCHANGE swaps two names at once: there is no instant without a step. The old
// content then has the partial directory's name. File systems without it (NFS, many in user space)
// answer EINVAL; there the old step is moved to ".NAME.replaced-<id>" first and the new one to its
// name second. A crash in between leaves no NAME, which is why readers take a ".replaced-"
// directory for NAME when NAME is absent. If the second rename fails, the first one is undone.
//
// A name that must be free. RENAME_NOREPLACE checks and renames in one step. Where it is refused we
// look first and rename then. In the gap another process could create the name; the writer's lock
// keeps other writers away, and rename(2) itself refuses to replace anything but an *empty*
// directory by a directory, so that no step can be lost even so.
//
// Sweepers. remove_if_abandoned() of another process removes partial directories that nobody holds
// locked. Between 3 and 5 the old content lies under such a name, so it is locked as well until it
// is gone; else it could be removed before 4.
//
// Rejected: hard links (not for directories), a symbolic link "current" (one step only, and tools
// that copy directories copy the link), a marker file written last (every foreign tool that opens a
// step would have to know it).

#include "storage/posix_publish.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <stdio.h>
#include <sys/random.h>
#include <sys/stat.h>

#include <array>
#include <cerrno>
#include <optional>
#include <utility>

#include "base/result_macros.h"
#include "base/system_error.h"
#include "storage/posix_calls.h"
#include "storage/process_lock.h"

namespace strandline::storage {
namespace {

// Looking whether the final name is taken and acting on it are two calls; if somebody creates and
// removes the name in between, look again, but not for ever.
constexpr int kReplaceAttemptsMax = 4;

// 128 random bits as hexadecimal digits, so that two replaced directories never share a name.
std::string random_id() {
  std::array<unsigned char, 16> bits{};
  // Cannot fail or be cut short for so few bytes once the machine has booted; if it does, the names
  // are less random and RENAME_NOREPLACE still keeps them apart.
  static_cast<void>(uninterrupted([&] { return ::getrandom(bits.data(), bits.size(), 0); }));
  std::string id;
  for (const unsigned char byte : bits) id += fmt::format("{:02x}", byte);
  return id;
}

bool is_refused(int error) { return error == EINVAL || error == ENOSYS || error == EOPNOTSUPP; }

class Publisher {
 public:
  Publisher(const PosixPartialDirectory::Place& place, const std::string& final_name,
            const PublishCalls& calls)
      : place_(place),
        root_(place.root.get()),
        final_name_(final_name),
        final_path_(place.root_path + '/' + final_name),
        calls_(calls) {}

  Status make_new() {
    const int error = rename_new(place_.name, final_name_);
    if (error == 0) return {};
    if (error == EEXIST) {
      return failure(Error{.code = ErrorCode::kAlreadyExists,
                           .message = fmt::format("'{}' exists already; choose another name or "
                                                  "allow it to be replaced",
                                                  final_path_),
                           .path = final_path_,
                           .system_errno = EEXIST});
    }
    return failure(base::system_error("publish", final_path_, error));
  }

  // Gives the name under which the old content lies now; empty if there was none.
  Result<std::string> replace() {
    for (int attempt = 0; attempt < kReplaceAttemptsMax; ++attempt) {
      const int error = exchange();
      if (error == 0) return place_.name;
      if (is_refused(error)) return replace_in_two_steps();
      if (error != ENOENT) return failure(base::system_error("replace", final_path_, error));
      const Status made = make_new();
      if (made) return std::string();
      if (made.error().code != ErrorCode::kAlreadyExists) return failure(made.error());
    }
    return failure(Error{.code = ErrorCode::kUnavailable,
                         .message = fmt::format("cannot replace '{}': something keeps creating and "
                                                "removing it; find out what, and save again",
                                                final_path_),
                         .path = final_path_});
  }

  [[nodiscard]] Status sync(int fd, const std::string& path) const {
    if (uninterrupted([&] { return calls_.sync(fd); }) == 0) return {};
    return failure(base::system_error("sync", path, errno));
  }

 private:
  Result<std::string> replace_in_two_steps() {
    const std::string aside = fmt::format(".{}.replaced-{}", final_name_, random_id());
    const int moved = rename_new(final_name_, aside);
    if (moved == ENOENT) {
      STRANDLINE_RETURN_IF_ERROR(make_new());
      return std::string();
    }
    if (moved != 0) {
      return failure(base::system_error("move aside for its replacement", final_path_, moved));
    }
    Status made = make_new();
    if (made) return aside;
    if (const int undone = rename_new(aside, final_name_); undone != 0) {
      made.error().message += fmt::format(
          "; the step it was to replace lies in '{}/{}' (moving it back failed too: {})",
          place_.root_path, aside, base::system_error("move back", final_path_, undone).message);
    }
    return failure(std::move(made).error());
  }

  // These give an errno, or 0.
  [[nodiscard]] int exchange() const { return rename(place_.name, final_name_, RENAME_EXCHANGE); }

  [[nodiscard]] int rename_new(const std::string& from, const std::string& to) const {
    const int error = rename(from, to, RENAME_NOREPLACE);
    if (!is_refused(error)) return error;
    struct stat taken {};
    if (::fstatat(root_, to.c_str(), &taken, AT_SYMLINK_NOFOLLOW) == 0) return EEXIST;
    if (errno != ENOENT) return errno;
    const int plain_error = rename(from, to, 0);
    return plain_error == ENOTEMPTY ? EEXIST : plain_error;
  }

  [[nodiscard]] int rename(const std::string& from, const std::string& to, unsigned flags) const {
    const int result =
        uninterrupted([&] { return calls_.rename(root_, from.c_str(), to.c_str(), flags); });
    return result == 0 ? 0 : errno;
  }

  const PosixPartialDirectory::Place& place_;
  const int root_;
  const std::string final_name_;
  const std::string final_path_;
  const PublishCalls& calls_;
};

// Locks what is to be replaced against sweepers, where that is possible.
std::optional<ProcessLock> lock_old(int root, const std::string& name) {
  Result<std::optional<ProcessLock>> lock =
      ProcessLock::try_acquire(root, name, kOpenDirectory, name);
  if (!lock) return std::nullopt;
  return std::move(*lock);
}

}  // namespace

Result<Publication> publish_directory(PosixPartialDirectory& partial, const std::string& final_name,
                                      Publish mode, const PublishCalls& calls) {
  const PosixPartialDirectory::Place& place = partial.place();
  if (!is_same_file(place.root.get(), place.name, place.directory.get())) {
    return failure(Error{.code = ErrorCode::kUnavailable,
                         .message = fmt::format("'{}' was removed or replaced while it was being "
                                                "written; keep other programs away from it and "
                                                "save again",
                                                partial.path()),
                         .path = partial.path()});
  }

  Publisher publisher(place, final_name, calls);
  STRANDLINE_RETURN_IF_ERROR(publisher.sync(place.directory.get(), partial.path()));
  std::optional<ProcessLock> old_lock;
  std::string old_name;
  if (mode == Publish::kNew) {
    STRANDLINE_RETURN_IF_ERROR(publisher.make_new());
  } else {
    old_lock = lock_old(place.root.get(), final_name);
    STRANDLINE_ASSIGN_OR_RETURN(old_name, publisher.replace());
  }
  partial.set_published();

  Publication publication{.durable = publisher.sync(place.root.get(), place.root_path)};
  if (publication.durable && !old_name.empty()) {
    // What cannot be removed now is a leftover that the next writer sweeps; the step is committed.
    static_cast<void>(remove_tree(place.root.get(), old_name, place.root_path));
  }
  return publication;
}

}  // namespace strandline::storage
