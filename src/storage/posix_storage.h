// Steps in a directory of a POSIX file system. Made by strandline::open_posix_storage().
#pragma once

#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/unique_fd.h"
#include "storage/posix_publish.h"
#include "strandline/storage.h"

namespace strandline::storage {

class PosixStorage final : public Storage {
 public:
  // As strandline::open_posix_storage(), publishing by these calls.
  [[nodiscard]] static Result<std::shared_ptr<Storage>> open_root(const std::filesystem::path& root,
                                                                  const PublishCalls& calls);

  PosixStorage(std::string root, const PublishCalls& calls);

  [[nodiscard]] Result<std::unique_ptr<PartialDirectory>> begin(std::string_view name) override;
  [[nodiscard]] Result<Publication> publish(std::unique_ptr<PartialDirectory> partial,
                                            std::string_view name, Publish mode) override;
  [[nodiscard]] Result<std::vector<std::string>> list() override;
  [[nodiscard]] Result<std::shared_ptr<ReadableDirectory>> open(std::string_view name) override;
  [[nodiscard]] Status remove(std::string_view name) override;
  [[nodiscard]] Status remove_if_abandoned(std::string_view name) override;
  [[nodiscard]] Result<std::unique_ptr<WriterLock>> lock(std::string_view opened_at) override;
  [[nodiscard]] std::string path() const override { return root_; }

 private:
  // Opened anew by each call, so that a root that was moved or mounted over meanwhile is found
  // where its path leads.
  [[nodiscard]] Result<base::UniqueFd> open_existing_root() const;
  [[nodiscard]] Result<base::UniqueFd> open_or_create_root();
  [[nodiscard]] Status check_name(std::string_view name) const;

  const std::string root_;  // Absolute.
  const PublishCalls calls_;
  std::atomic<bool> root_name_synced_ = false;
};

}  // namespace strandline::storage
