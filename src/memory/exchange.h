// The shared memory that this process knows: its own slabs, and what it has attached of others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "memory/generation_table.h"
#include "memory/sends.h"
#include "strandline/error.h"
#include "strandline/shared_memory.h"

namespace strandline::memory {

// What share() made, and what must be kept until it is claimed.
struct Shared {
  SharedRange range;
  std::shared_ptr<const void> keep;
  std::function<bool()> claimed;  // Callable as long as `keep` exists.
};

// Whether a range that is to be attached is a part of the generation.
[[nodiscard]] bool lies_within(const SharedRange& range, const Generation& generation);

// The error of share() for memory that is not shared.
[[nodiscard]] Error not_shared();
// The errors of attach().
[[nodiscard]] Error out_of_bounds(const SharedRange& range);
[[nodiscard]] Error used_again(const SharedRange& range);

// Memory that can be shared: one slab, of this process or of another. Thread-safety: thread-safe.
class SharedSource {
 public:
  SharedSource() = default;
  virtual ~SharedSource() = default;
  SharedSource(const SharedSource&) = delete;
  SharedSource& operator=(const SharedSource&) = delete;

  // Nothing if `data` is not memory of this source that is held at present.
  [[nodiscard]] virtual std::optional<Result<Shared>> share(const std::byte* data,
                                                            std::uint64_t bytes) = 0;
  // REQUIRES: `range` names this slab.
  [[nodiscard]] virtual Result<AttachedMemory> attach(const SharedRange& range) = 0;
};

// Thread-safety: thread-safe. Sources are not kept alive.
class Exchange {
 public:
  void add(std::string slab, const std::shared_ptr<SharedSource>& source)
      STRANDLINE_EXCLUDES(mutex_);

  [[nodiscard]] Result<SharedRange> share(const std::byte* data, std::uint64_t bytes)
      STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] Result<AttachedMemory> attach(const SharedRange& range) STRANDLINE_EXCLUDES(mutex_);

  [[nodiscard]] Sends& sends() { return sends_; }

 private:
  struct Known {
    std::string slab;
    std::weak_ptr<SharedSource> source;
  };

  void add_locked(std::string slab, const std::shared_ptr<SharedSource>& source)
      STRANDLINE_REQUIRES(mutex_);

  base::Mutex mutex_;
  // A slab or two of the process's own, and those of the few that send to it.
  std::vector<Known> known_ STRANDLINE_GUARDED_BY(mutex_);
  Sends sends_;
};

// The one of this process; a forked child has its own, empty at first.
[[nodiscard]] Exchange& exchange();

}  // namespace strandline::memory
