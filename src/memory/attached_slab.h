// A shared slab of another process, mapped here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "base/mutex.h"
#include "base/unique_fd.h"
#include "memory/exchange.h"
#include "memory/generation_table.h"
#include "strandline/error.h"
#include "strandline/shared_memory.h"

namespace strandline::memory {

// Thread-safety: thread-safe.
class AttachedSlab final : public SharedSource, public std::enable_shared_from_this<AttachedSlab> {
 public:
  // Opens the slab that `range` names. Fails as strandline::attach().
  [[nodiscard]] static Result<std::shared_ptr<AttachedSlab>> open(const SharedRange& range);
  ~AttachedSlab() override;

  std::optional<Result<Shared>> share(const std::byte* data, std::uint64_t bytes) override
      STRANDLINE_EXCLUDES(mutex_);
  Result<AttachedMemory> attach(const SharedRange& range) override STRANDLINE_EXCLUDES(mutex_);

 private:
  class Holder;
  struct Mapped {
    std::byte* data = nullptr;   // Null before it is mapped.
    Generation generation = {};  // As it was checked when it was locked.
    std::size_t holders = 0;
  };

  AttachedSlab(std::string id, base::UniqueFd file, std::uint64_t file_bytes, std::byte* table);

  [[nodiscard]] Result<Generation> lock_generation(const SharedRange& range) const;
  [[nodiscard]] Status map(const Generation& generation, Mapped& mapped) const;
  void drop(std::uint64_t generation) STRANDLINE_EXCLUDES(mutex_);
  void free_pages_of_orphan(const Generation& generation) const;

  // Constant after construction.
  const std::string id_;
  const std::uint64_t fork_generation_;
  const base::UniqueFd file_;
  const std::uint64_t file_bytes_;
  std::byte* const table_memory_;

  base::Mutex mutex_;
  std::map<std::uint64_t, Mapped> mapped_ STRANDLINE_GUARDED_BY(mutex_);
};

}  // namespace strandline::memory
