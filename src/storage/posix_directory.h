// Directories of a POSIX storage: one being written, and one opened for reading.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/mutex.h"
#include "base/unique_fd.h"
#include "storage/process_lock.h"
#include "strandline/storage.h"

namespace strandline::storage {

// Files of one ReadableDirectory that stay open. A restore reads a step's files from about as many
// threads as this, each one file at a time; more would cost a process with many steps open its
// descriptors, fewer would open a file anew for each chunk.
inline constexpr std::size_t kOpenFilesMax = 8;

// A directory nobody reads yet. It holds a lock on the directory, so that
// Storage::remove_if_abandoned() of any process can tell that its writer lives.
class PosixPartialDirectory final : public PartialDirectory {
 public:
  // Where it is: `name` in the open directory `root`, whose path is `root_path`.
  struct Place {
    base::UniqueFd root;
    std::string root_path;
    std::string name;
    base::UniqueFd directory;
    std::optional<ProcessLock> lock;  // Empty where the file system has no locks.
  };
  explicit PosixPartialDirectory(Place place);
  ~PosixPartialDirectory() override;
  PosixPartialDirectory(const PosixPartialDirectory&) = delete;
  PosixPartialDirectory& operator=(const PosixPartialDirectory&) = delete;

  [[nodiscard]] Result<std::unique_ptr<WritableFile>> create(std::string_view name,
                                                             std::uint64_t bytes) override;
  [[nodiscard]] Result<std::vector<std::string>> list() override;

  // For publishing.
  [[nodiscard]] const Place& place() const { return place_; }
  [[nodiscard]] std::string path() const { return place_.root_path + '/' + place_.name; }
  [[nodiscard]] bool belongs_to_parent_process() const;
  void set_published() { published_ = true; }

 private:
  const Place place_;
  const std::uint64_t fork_generation_;
  bool published_ = false;
};

// A directory read through one descriptor, whatever its name comes to be.
class PosixReadableDirectory final : public ReadableDirectory {
 public:
  PosixReadableDirectory(base::UniqueFd directory, std::string path);

  [[nodiscard]] Result<std::vector<std::string>> list() override;
  [[nodiscard]] Result<std::uint64_t> file_bytes(std::string_view name) override
      STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] Status read_at(std::string_view name, std::uint64_t offset,
                               std::span<std::byte> bytes) override STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] std::string path() const override { return path_; }

 private:
  struct OpenFile {
    std::string name;
    std::shared_ptr<const base::UniqueFd> fd;
  };
  [[nodiscard]] Result<std::shared_ptr<const base::UniqueFd>> open_file(std::string_view name)
      STRANDLINE_EXCLUDES(mutex_);

  const base::UniqueFd directory_;
  const std::string path_;

  base::Mutex mutex_;
  std::vector<OpenFile> open_files_ STRANDLINE_GUARDED_BY(mutex_);  // Latest used last.
};

}  // namespace strandline::storage
