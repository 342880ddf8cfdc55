// One file of a step, being written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/mutex.h"
#include "base/unique_fd.h"
#include "strandline/storage.h"

namespace strandline::storage {

// Files smaller than this are not given their space in advance: one small write finds out as well.
inline constexpr std::uint64_t kReserveBytesMin = std::uint64_t{1} << 20;

// Writes with pwrite(2) and completes before write_at() returns.
class PosixWritableFile final : public WritableFile {
 public:
  // Creates `name` in `directory`, reserving `bytes`. `path` is the file's, for messages.
  [[nodiscard]] static Result<std::unique_ptr<WritableFile>> create(int directory,
                                                                    const std::string& name,
                                                                    std::uint64_t bytes,
                                                                    std::string path);

  PosixWritableFile(base::UniqueFd fd, std::string path);

  void write_at(std::uint64_t offset, std::span<const std::byte> bytes, Completion done) override
      STRANDLINE_EXCLUDES(mutex_);

  // Also closes the file: the last call on it but for its destructor. Repeated, it gives the same
  // answer again.
  [[nodiscard]] Status sync() override STRANDLINE_EXCLUDES(mutex_);

 private:
  [[nodiscard]] Status remember(Status status) STRANDLINE_EXCLUDES(mutex_);

  const std::string path_;
  base::UniqueFd fd_;  // Closed by sync(), which runs alone.

  base::Mutex mutex_;
  std::optional<Error> first_error_ STRANDLINE_GUARDED_BY(mutex_);
};

}  // namespace strandline::storage
