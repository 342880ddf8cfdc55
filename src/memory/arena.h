// The state of one slab, which its leases share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "base/wait.h"
#include "memory/exchange.h"
#include "memory/free_ranges.h"
#include "memory/host_memory.h"
#include "memory/pages.h"
#include "memory/slab.h"
#include "strandline/error.h"
#include "strandline/shared_memory.h"

namespace strandline::memory {

class SharedPages;

// Thread-safety: thread-safe.
class Arena final : public SharedSource, public std::enable_shared_from_this<Arena> {
 public:
  explicit Arena(Slab::Options options);
  ~Arena() override;

  [[nodiscard]] Status adapt(std::uint64_t state_bytes) STRANDLINE_EXCLUDES(mutex_);

  // Ranges of `sizes` bytes, which are multiples of kPageBytes; null for those of none. As
  // Slab::lease().
  [[nodiscard]] Result<std::vector<std::byte*>> take(const std::vector<std::uint64_t>& sizes,
                                                     base::Wait& wait) STRANDLINE_EXCLUDES(mutex_);
  // A holder of what take() gave has gone.
  void give_back(std::byte* data) STRANDLINE_EXCLUDES(mutex_);

  // See Slab::retire().
  void retire() STRANDLINE_EXCLUDES(mutex_);

  std::optional<Result<Shared>> share(const std::byte* data, std::uint64_t bytes) override
      STRANDLINE_EXCLUDES(mutex_);
  // At the same addresses as always. Also brings back what nobody held any more here, but another
  // process did.
  Result<AttachedMemory> attach(const SharedRange& range) override STRANDLINE_EXCLUDES(mutex_);

  // Of the slab, as other processes know it. REQUIRES: it is shared.
  [[nodiscard]] const std::string& id() const;

  [[nodiscard]] std::uint64_t bytes_max() const STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    return bytes_max_;
  }
  [[nodiscard]] std::uint64_t bytes_mapped() const STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    return bytes_mapped_;
  }
  [[nodiscard]] std::uint64_t bytes_in_use() const STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    return bytes_in_use_;
  }

 private:
  // Why a request was not served; nothing means: wait for leases to come back.
  using Refusal = std::optional<Error>;

  struct Leased {
    std::uint64_t bytes = 0;
    std::size_t holders = 0;  // In this process. None: another process holds it.
  };
  struct Taken {
    std::vector<std::byte*> ranges;  // One for each size.
    std::vector<bool> fresh;         // Not backed yet.
  };

  [[nodiscard]] Result<Taken> reserve(const std::vector<std::uint64_t>& sizes, base::Wait& wait)
      STRANDLINE_EXCLUDES(mutex_);
  bool try_take(const std::vector<std::uint64_t>& sizes, Taken& taken, Refusal& refusal)
      STRANDLINE_REQUIRES(mutex_);
  bool map_missing(const std::vector<std::uint64_t>& sizes, Taken& taken, Refusal& refusal)
      STRANDLINE_REQUIRES(mutex_);
  bool make_room(std::uint64_t new_bytes, Refusal& refusal) STRANDLINE_REQUIRES(mutex_);
  void unmap_free(std::uint64_t bytes) STRANDLINE_REQUIRES(mutex_);
  void record(const std::vector<std::uint64_t>& sizes, const Taken& taken)
      STRANDLINE_REQUIRES(mutex_);
  void put_back(const std::vector<std::uint64_t>& sizes, Taken& taken) STRANDLINE_REQUIRES(mutex_);
  void undo(const std::vector<std::uint64_t>& sizes, Taken& taken) STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] bool close(std::byte* data, std::uint64_t bytes) STRANDLINE_REQUIRES(mutex_);
  void close_lent() STRANDLINE_REQUIRES(mutex_);

  // Constant after construction.
  const bool fixed_;
  const DefaultCeiling default_ceiling_;
  const std::function<Result<HostMemory>()> host_memory_;
  const std::uint64_t fork_generation_;

  mutable base::Mutex mutex_;
  base::ConditionVariable returned_;
  const std::unique_ptr<Pages> pages_;  // Guarded, but for Pages::back().
  SharedPages* const shared_pages_;     // The same, if they are shared; else null.
  std::uint64_t bytes_max_ STRANDLINE_GUARDED_BY(mutex_);
  std::uint64_t bytes_mapped_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  std::uint64_t bytes_in_use_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  FreeRanges free_ STRANDLINE_GUARDED_BY(mutex_);
  bool retired_ STRANDLINE_GUARDED_BY(mutex_) = false;
  std::map<std::byte*, Leased> leased_ STRANDLINE_GUARDED_BY(mutex_);
  std::size_t lent_ STRANDLINE_GUARDED_BY(mutex_) = 0;  // Of leased_, those without holders.
};

// One holder of a range of an arena.
class LeasedRange {
 public:
  // `data` may be null, for no bytes.
  LeasedRange(std::shared_ptr<Arena> arena, std::byte* data, std::uint64_t bytes)
      : arena_(std::move(arena)), data_(data), bytes_(bytes) {}
  ~LeasedRange() {
    if (data_ != nullptr) arena_->give_back(data_);
  }
  LeasedRange(const LeasedRange&) = delete;
  LeasedRange& operator=(const LeasedRange&) = delete;

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }

 private:
  const std::shared_ptr<Arena> arena_;
  std::byte* const data_;
  const std::uint64_t bytes_;
};

}  // namespace strandline::memory
