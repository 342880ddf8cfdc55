/// @file
/// The interface to what checkpoints are kept on. `publish()` is the only commit point.
///
/// A storage holds *steps*: flat directories of files, each complete once published. What is being
/// written is a PartialDirectory, which no reader takes for a step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "strandline/device.h"
#include "strandline/error.h"
#include "strandline/export.h"

namespace strandline::inline v0 {

/// A file being written. Thread-safety: write_at is thread-safe, the others single-threaded.
class STRANDLINE_EXPORT WritableFile {
 public:
  virtual ~WritableFile() = default;

  /// Writes all of `bytes` at `offset`. Takes completions so that a storage may write in the
  /// background; `bytes` must stay valid until then.
  virtual void write_at(std::uint64_t offset, std::span<const std::byte> bytes,
                        Completion done) = 0;

  /// Makes the file durable and closes it: all writes must have completed, and none may follow. If
  /// a write or an earlier sync failed, fails with that error again. Blocks.
  [[nodiscard]] virtual Status sync() = 0;
};

/// A directory being written; invisible to readers until Storage::publish(). Destroying it without
/// publishing removes it, as far as that is possible. Thread-safety: single-threaded.
class STRANDLINE_EXPORT PartialDirectory {
 public:
  virtual ~PartialDirectory() = default;

  /// Creates a file that did not exist. `bytes` is the size that it will have.
  [[nodiscard]] virtual Result<std::unique_ptr<WritableFile>> create(std::string_view name,
                                                                     std::uint64_t bytes) = 0;

  /// Names of everything in it, sorted; what a dead run may have planted included.
  [[nodiscard]] virtual Result<std::vector<std::string>> list() = 0;
};

/// A published (or replaced) step opened for reading. It stays readable while another process
/// replaces or removes the step, as far as the storage can. Thread-safety: thread-safe.
class STRANDLINE_EXPORT ReadableDirectory {
 public:
  virtual ~ReadableDirectory() = default;

  /// Names of the files in it, sorted.
  [[nodiscard]] virtual Result<std::vector<std::string>> list() = 0;

  /// The size of a file. Fails with kNotFound if it is absent or not a plain file.
  [[nodiscard]] virtual Result<std::uint64_t> file_bytes(std::string_view name) = 0;

  /// Fills `bytes` from `offset`. Fails with kCorrupt where the file ends before. Blocks.
  [[nodiscard]] virtual Status read_at(std::string_view name, std::uint64_t offset,
                                       std::span<std::byte> bytes) = 0;

  /// The path for messages.
  [[nodiscard]] virtual std::string path() const = 0;
};

/// Held by the one writer of a storage; released by its destructor or by the process's death.
class STRANDLINE_EXPORT WriterLock {
 public:
  virtual ~WriterLock() = default;

  /// Whether it still keeps others out: false once somebody removed what the lock lies on, such as
  /// the whole storage, so that another writer may have come in. Thread-safety: single-threaded.
  [[nodiscard]] virtual bool held() const = 0;
};

/// What publish() may do to a step of the same name.
enum class Publish : std::uint8_t {
  kNew,      ///< Fail with kAlreadyExists if there is one.
  kReplace,  ///< Take its place in one step; it is removed afterwards.
};

/// What publish() reached: the step is visible.
struct Publication {
  Status durable;  ///< An error if the parent directory could not be synced after the rename.
};

/// Where checkpoints live. Names never contain '/' and are checked by the caller.
///
/// Thread-safety: thread-safe. Blocking: every call may block on the device below it.
class STRANDLINE_EXPORT Storage {
 public:
  virtual ~Storage() = default;

  /// Starts a directory named `name` (".step-00001300.partial-…"). Whatever was there under that
  /// name is removed first.
  [[nodiscard]] virtual Result<std::unique_ptr<PartialDirectory>> begin(std::string_view name) = 0;

  /// Makes `partial` visible as `name`: syncs the directory, renames it, syncs the parent. On an
  /// error nothing changed. On success the step is visible, and Publication::durable says whether
  /// it also survives a power cut.
  [[nodiscard]] virtual Result<Publication> publish(std::unique_ptr<PartialDirectory> partial,
                                                    std::string_view name, Publish mode) = 0;

  /// Names of everything at the top: steps, partial directories, others; sorted. A storage that
  /// does not exist yet is empty.
  [[nodiscard]] virtual Result<std::vector<std::string>> list() = 0;

  /// Opens a step for reading.
  [[nodiscard]] virtual Result<std::shared_ptr<ReadableDirectory>> open(std::string_view name) = 0;

  /// Removes a step, a partial directory or any leftover. A step is renamed to a name that no
  /// reader takes for a step before its files go. Missing is success.
  [[nodiscard]] virtual Status remove(std::string_view name) = 0;

  /// Removes a partial directory or leftover unless its writer is alive. Missing is success.
  [[nodiscard]] virtual Status remove_if_abandoned(std::string_view name) = 0;

  /// Becomes the one writer, creating the storage if necessary. `opened_at` says where, for the
  /// error of whoever comes second: kUnavailable, naming host, process and `opened_at`.
  [[nodiscard]] virtual Result<std::unique_ptr<WriterLock>> lock(std::string_view opened_at) = 0;

  /// The path for messages.
  [[nodiscard]] virtual std::string path() const = 0;
};

/// A storage in a directory of a POSIX file system. `root` is made absolute now; it is created by
/// the first begin() or lock(). Fails with kInvalidArgument on a dangling link or a plain file.
[[nodiscard]] STRANDLINE_EXPORT Result<std::shared_ptr<Storage>> open_posix_storage(
    const std::filesystem::path& root);

}  // namespace strandline::inline v0
