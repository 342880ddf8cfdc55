// Steps in a directory of a POSIX file system.
//
// The root holds steps under their names, and everything that is not a step under names that begin
// with a dot: what is being written, moved aside or removed, and the writer's lock. A reader that
// goes by names alone therefore never meets half a step. posix_publish.cc explains how a step comes
// into being, writer_lock.cc who may write; here is what remains: finding and making the root,
// beginning, removing.
//
// Removing. A step's files go one by one, so the step is first renamed to ".NAME.deleting": readers
// that look from then on do not see it, and those that have it open find files missing and start
// again. Nothing is synced. After a power cut the step may be back, as a whole or under the name of
// a leftover, and is removed again; a file system that does not keep the order of rename and unlink
// could bring it back under its own name with files missing, which readers report as damaged, and
// which is never a step that somebody still needs: those are not removed.
//
// Abandoned directories. A partial directory is locked (flock on the directory itself) from begin()
// until it is published or removed. remove_if_abandoned() takes that lock first; whoever holds it
// is alive. Having it, it looks whether the name still leads to the locked directory: the writer
// may have published it between our opening and our locking, and then it is no leftover.
// Directories are locked per host on NFS; only the holder of the writer's lock sweeps there.
//
// Making the root. Each directory made is synced into its parent, and the root's own parent also
// when the root existed: a run that died right after making it may not have come to that. Without
// it a power cut could take the whole root with all its synced steps.

#include "storage/posix_storage.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <cerrno>
#include <optional>
#include <system_error>
#include <utility>

#include "base/result_macros.h"
#include "base/system_error.h"
#include "storage/posix_calls.h"
#include "storage/posix_directory.h"
#include "storage/process_lock.h"
#include "storage/writer_lock.h"

namespace strandline::storage {
namespace {

// A sweeper may take a directory in the instant between our making and our locking it; that it
// happens again and again is not to be expected.
constexpr int kBeginAttemptsMax = 8;

// The root itself may be a link to another disk.
constexpr int kOpenRoot = O_RDONLY | O_DIRECTORY | O_CLOEXEC;

constexpr mode_t kDirectoryMode = 0777;  // Less the user's umask.

Error invalid_root(const std::filesystem::path& path, std::string message) {
  return Error{
      .code = ErrorCode::kInvalidArgument, .message = std::move(message), .path = path.string()};
}

Result<std::string> absolute_path(const std::filesystem::path& root) {
  if (root.empty() || root.native().find('\0') != std::string::npos) {
    return failure(invalid_root(root,
                                "the path of the checkpoints is empty or contains a NUL; "
                                "give a directory"));
  }
  std::error_code error;
  std::string path = std::filesystem::absolute(root, error).string();
  if (error) return failure(base::system_error("make absolute", root.string(), error.value()));
  // "/a/b/" and "/a/b/." are "/a/b". Other dots stay: "link/.." is not what it looks like.
  const auto ends_with = [&path](std::string_view end) {
    return path.size() > end.size() &&
           std::string_view(path).substr(path.size() - end.size()) == end;
  };
  while (ends_with("/") || ends_with("/.")) path.resize(path.find_last_of('/'));
  return path.empty() ? std::string("/") : path;
}

// Fails unless `root` is a directory or can be made one.
Status check_root(const std::filesystem::path& root) {
  for (std::filesystem::path path = root;; path = path.parent_path()) {
    struct stat found {};
    if (::stat(path.c_str(), &found) == 0) {
      if (S_ISDIR(found.st_mode)) return {};
      return failure(invalid_root(
          path, fmt::format("'{}' is a file, and checkpoints need a directory; move it away or "
                            "choose another path",
                            path.string())));
    }
    if (errno == ENOENT && ::lstat(path.c_str(), &found) == 0) {
      return failure(invalid_root(
          path, fmt::format("'{}' is a symbolic link to something that does not exist; create its "
                            "target (is a disk not mounted?) or remove the link",
                            path.string())));
    }
    // Below a file everything is ENOTDIR; the file itself is found on the way up.
    if (errno != ENOENT && errno != ENOTDIR) {
      return failure(base::system_error("examine", path.string(), errno));
    }
    if (!path.has_relative_path()) return {};
  }
}

Status sync_directory(const std::filesystem::path& path) {
  STRANDLINE_ASSIGN_OR_RETURN(const base::UniqueFd fd,
                              open_at(AT_FDCWD, path.string(), kOpenRoot, "open", path.string()));
  return sync_descriptor(fd.get(), path.string());
}

// Makes a directory and its parents, and syncs each into its parent.
Status make_directories(const std::filesystem::path& root) {
  // Since the storage was opened a link may have lost its target, or a file taken a place.
  STRANDLINE_RETURN_IF_ERROR(check_root(root));
  std::vector<std::filesystem::path> missing;
  struct stat found {};
  for (std::filesystem::path path = root;
       ::stat(path.c_str(), &found) != 0 && path.has_relative_path(); path = path.parent_path()) {
    missing.push_back(path);
  }
  for (auto path = missing.rbegin(); path != missing.rend(); ++path) {
    if (::mkdir(path->c_str(), kDirectoryMode) == 0) {
      STRANDLINE_RETURN_IF_ERROR(sync_directory(path->parent_path()));
    } else if (errno != EEXIST) {
      return failure(base::system_error("create directory", path->string(), errno));
    }
  }
  return {};
}

bool is_missing(const Error& error) { return error.system_errno == ENOENT; }

// Opens and locks the directory that was just made. False if a sweeper was faster.
Result<bool> open_and_lock(PosixPartialDirectory::Place& place, const std::string& path) {
  const int root = place.root.get();
  Result<std::optional<ProcessLock>> lock =
      ProcessLock::try_acquire(root, place.name, kOpenDirectory, path);
  if (!lock) {
    if (is_missing(lock.error())) return false;
    if (!ProcessLock::is_unsupported(lock.error())) return failure(std::move(lock).error());
    // Without locks nobody sweeps what may be in use, so that none is needed.
    STRANDLINE_ASSIGN_OR_RETURN(place.directory,
                                open_at(root, place.name, kOpenDirectory, "open", path));
    return true;
  }
  if (!*lock || !is_same_file(root, place.name, (*lock)->descriptor())) return false;
  place.lock = std::move(*lock);
  STRANDLINE_ASSIGN_OR_RETURN(place.directory,
                              open_at(place.lock->descriptor(), ".", kOpenDirectory, "open", path));
  return true;
}

}  // namespace

Result<std::shared_ptr<Storage>> PosixStorage::open_root(const std::filesystem::path& root,
                                                         const PublishCalls& calls) {
  STRANDLINE_ASSIGN_OR_RETURN(std::string path, absolute_path(root));
  STRANDLINE_RETURN_IF_ERROR(check_root(path));
  return std::make_shared<PosixStorage>(std::move(path), calls);
}

PosixStorage::PosixStorage(std::string root, const PublishCalls& calls)
    : root_(std::move(root)), calls_(calls) {}

Result<base::UniqueFd> PosixStorage::open_existing_root() const {
  return open_at(AT_FDCWD, root_, kOpenRoot, "open", root_);
}

Result<base::UniqueFd> PosixStorage::open_or_create_root() {
  if (!root_name_synced_.load()) {
    STRANDLINE_RETURN_IF_ERROR(make_directories(root_));
    const Status synced = sync_directory(std::filesystem::path(root_).parent_path());
    // A directory that existed may lie in one that we may not list; then it is not ours to sync.
    if (!synced && synced.error().system_errno != EACCES) return failure(synced.error());
    root_name_synced_.store(true);
  }
  Result<base::UniqueFd> root = open_existing_root();
  if (root || !is_missing(root.error())) return root;
  // Removed since; whoever did that may have it back.
  STRANDLINE_RETURN_IF_ERROR(make_directories(root_));
  return open_existing_root();
}

Status PosixStorage::check_name(std::string_view name) const {
  STRANDLINE_RETURN_IF_ERROR(check_entry_name(name, root_));
  if (name != kLockFileName) return {};
  return failure(Error{.code = ErrorCode::kInvalidArgument,
                       .message = fmt::format("'{}/{}' is the writer's lock and never touched; "
                                              "choose another name",
                                              root_, name),
                       .path = root_});
}

Result<std::unique_ptr<PartialDirectory>> PosixStorage::begin(std::string_view name) {
  STRANDLINE_RETURN_IF_ERROR(check_name(name));
  PosixPartialDirectory::Place place;
  place.root_path = root_;
  place.name = name;
  STRANDLINE_ASSIGN_OR_RETURN(place.root, open_or_create_root());
  const int root = place.root.get();
  const std::string path = root_ + '/' + place.name;
  for (int attempt = 0; attempt < kBeginAttemptsMax; ++attempt) {
    STRANDLINE_RETURN_IF_ERROR(remove_tree(root, place.name, root_));
    if (::mkdirat(root, place.name.c_str(), kDirectoryMode) != 0) {
      if (errno == EEXIST) continue;
      return failure(base::system_error("create directory", path, errno));
    }
    const Result<bool> ours = open_and_lock(place, path);
    if (!ours) {
      static_cast<void>(remove_tree(root, place.name, root_));
      return failure(ours.error());
    }
    if (*ours) return std::make_unique<PosixPartialDirectory>(std::move(place));
  }
  return failure(Error{.code = ErrorCode::kUnavailable,
                       .message = fmt::format("cannot create '{}': something keeps removing it; "
                                              "find out what, and save again",
                                              path),
                       .path = path});
}

Result<Publication> PosixStorage::publish(std::unique_ptr<PartialDirectory> partial,
                                          std::string_view name, Publish mode) {
  STRANDLINE_RETURN_IF_ERROR(check_name(name));
  auto* const own = dynamic_cast<PosixPartialDirectory*>(partial.get());
  if (own == nullptr || own->place().root_path != root_) {
    return failure(Error{.code = ErrorCode::kInvalidArgument,
                         .message = fmt::format("'{}/{}' is to be published from a directory that "
                                                "this storage did not begin; use its own begin()",
                                                root_, name),
                         .path = root_});
  }
  if (own->belongs_to_parent_process()) {
    return failure(Error{.code = ErrorCode::kUnavailable,
                         .message = fmt::format("'{}' belongs to the process that forked this one; "
                                                "open a Checkpointer of your own",
                                                own->path()),
                         .path = own->path()});
  }
  return publish_directory(*own, std::string(name), mode, calls_);
}

Result<std::vector<std::string>> PosixStorage::list() {
  const Result<base::UniqueFd> root = open_existing_root();
  if (root) return list_directory(root->get(), root_);
  if (is_missing(root.error())) return std::vector<std::string>();
  return failure(root.error());
}

Result<std::shared_ptr<ReadableDirectory>> PosixStorage::open(std::string_view name) {
  STRANDLINE_RETURN_IF_ERROR(check_name(name));
  const std::string path = fmt::format("{}/{}", root_, name);
  STRANDLINE_ASSIGN_OR_RETURN(const base::UniqueFd root, open_existing_root());
  // A step that somebody moved to another disk and left a link for is read like any other.
  Result<base::UniqueFd> directory =
      open_at(root.get(), std::string(name), kOpenRoot, "open", path);
  if (!directory) {
    Error error = std::move(directory).error();
    if (error.system_errno == ENOTDIR) {
      error.code = ErrorCode::kNotFound;
      error.message = fmt::format("'{}' is not a directory, so it is no checkpoint", path);
    }
    return failure(std::move(error));
  }
  return std::make_shared<PosixReadableDirectory>(std::move(*directory), path);
}

Status PosixStorage::remove(std::string_view name) {
  STRANDLINE_RETURN_IF_ERROR(check_name(name));
  const Result<base::UniqueFd> root = open_existing_root();
  if (!root) return is_missing(root.error()) ? Status{} : Status(failure(root.error()));
  if (name.front() == '.') return remove_tree(root->get(), std::string(name), root_);

  const std::string deleting = fmt::format(".{}.deleting", name);
  STRANDLINE_RETURN_IF_ERROR(remove_tree(root->get(), deleting, root_));
  const std::string step(name);
  if (::renameat(root->get(), step.c_str(), root->get(), deleting.c_str()) != 0) {
    if (errno == ENOENT) return {};
    return failure(base::system_error("remove", fmt::format("{}/{}", root_, name), errno));
  }
  return remove_tree(root->get(), deleting, root_);
}

Status PosixStorage::remove_if_abandoned(std::string_view name) {
  STRANDLINE_RETURN_IF_ERROR(check_name(name));
  const std::string path = fmt::format("{}/{}", root_, name);
  if (name.front() != '.') {
    return failure(Error{.code = ErrorCode::kInvalidArgument,
                         .message = fmt::format("'{}' is not the name of a leftover (they begin "
                                                "with '.'); use remove() for a step",
                                                path),
                         .path = path});
  }
  const Result<base::UniqueFd> root = open_existing_root();
  if (!root) return is_missing(root.error()) ? Status{} : Status(failure(root.error()));
  const std::string leftover(name);
  const Result<std::optional<ProcessLock>> lock =
      ProcessLock::try_acquire(root->get(), leftover, kOpenDirectory, path);
  if (!lock) {
    const int error = lock.error().system_errno;
    if (error == ENOENT) return {};
    // A file or a link, which no writer makes under such a name, let alone holds.
    if (error == ENOTDIR || error == ELOOP) return remove_tree(root->get(), leftover, root_);
    return failure(lock.error());
  }
  const bool writer_lives = !lock->has_value();
  if (writer_lives) return {};
  if (!is_same_file(root->get(), leftover, (*lock)->descriptor())) return {};
  return remove_tree(root->get(), leftover, root_);
}

Result<std::unique_ptr<WriterLock>> PosixStorage::lock(std::string_view opened_at) {
  STRANDLINE_ASSIGN_OR_RETURN(const base::UniqueFd root, open_or_create_root());
  return acquire_writer_lock(root.get(), root_, opened_at);
}

}  // namespace strandline::storage

namespace strandline::inline v0 {

Result<std::shared_ptr<Storage>> open_posix_storage(const std::filesystem::path& root) {
  return storage::PosixStorage::open_root(root, {});
}

}  // namespace strandline::inline v0
