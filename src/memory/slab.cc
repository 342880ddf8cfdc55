// Memory for staging under a ceiling that holds.
//
// Problem. A generation of a training job's state is gigabytes. Two or more live at once: the one
// being written and the one being copied. They must never overlap, their sum must stay under a
// ceiling that the user can rely on (the alternative is the kernel killing the job), and pages once
// touched should be used again: first touch is ten times slower than the copy itself.
//
// Approach. The arena knows its mapped memory as ranges of pages, each leased or free. A lease
// takes the smallest free range that is large enough; a returned range is joined with its free
// neighbours. Where nothing fits, the arena maps a new range. The budget counts *mapped* bytes,
// free ones included, because their pages stay resident. So when a new range would break the
// ceiling, free ranges are unmapped first, just as many pages as are needed. munmap works on any
// page, so fragmentation costs address space (plentiful) and never budget: if the leases in use
// plus what is asked for fit under the ceiling, the request succeeds. Generations that repeat find
// the ranges of their predecessors and neither map nor unmap anything.
//
// Before mapping more than it unmaps, the arena compares with what host and cgroup have free (see
// host_memory.cc) and unmaps free ranges rather than grow where they are short. Untouched pages do
// not count as taken in that figure yet; half of what is free, which is the default ceiling, leaves
// room for that.
//
// Life cycle. A lease is a counted reference to a range, and the range keeps the arena alive, so
// leases outlive the Slab. Free ranges are unmapped when the last of Slab and leases is gone.
//
// Fork. The ranges are not inherited (MADV_DONTFORK): data-loader workers forked by the trainer
// would otherwise share the pages copy-on-write, and every later generation would be copied page by
// page by the kernel. In a forked child returning a lease does nothing.
//
// Concurrency. One mutex; waiters sleep on one condition variable, woken by every return. Waiters
// are not served in order of arrival: a waiter for much memory at the head of a queue would block
// the next wave of a snapshot whose earlier waves it is waiting for.
//
// Rejected: a buddy allocator (rounds gigabytes up to powers of two), one region per generation
// (sizes that change leave regions that fit nothing), malloc (unaligned, and its budget is opaque).

#include "memory/slab.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <utility>

#include "base/checked_math.h"
#include "base/fork.h"
#include "base/mutex.h"
#include "base/result_macros.h"
#include "base/system_error.h"

namespace strandline::memory {

// The pages of one slab.
class Arena {
 public:
  explicit Arena(Slab::Options options)
      : fixed_(options.host_bytes_max.has_value()),
        default_ceiling_(options.default_ceiling),
        host_memory_(std::move(options.host_memory)),
        fork_generation_(base::fork_generation()),
        bytes_max_(options.host_bytes_max.value_or(0)) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  [[nodiscard]] Status adapt(std::uint64_t state_bytes) STRANDLINE_EXCLUDES(mutex_);

  // Ranges of `sizes` bytes, which are multiples of kPageBytes.
  [[nodiscard]] Result<std::vector<std::byte*>> take(const std::vector<std::uint64_t>& sizes,
                                                     base::Wait& wait) STRANDLINE_EXCLUDES(mutex_);
  void give_back(std::byte* data, std::uint64_t bytes) STRANDLINE_EXCLUDES(mutex_);

  void unmap_all_free() STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    std::uint64_t free_bytes = 0;
    for (const auto& [data, bytes] : free_) free_bytes += bytes;
    unmap_free(free_bytes);
  }

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

  bool try_take(const std::vector<std::uint64_t>& sizes, std::vector<std::byte*>& ranges,
                Refusal& refusal) STRANDLINE_REQUIRES(mutex_);
  bool map_missing(const std::vector<std::uint64_t>& sizes, std::vector<std::byte*>& ranges,
                   Refusal& refusal) STRANDLINE_REQUIRES(mutex_);
  bool make_room(std::uint64_t new_bytes, Refusal& refusal) STRANDLINE_REQUIRES(mutex_);
  void unmap_free(std::uint64_t bytes) STRANDLINE_REQUIRES(mutex_);
  std::byte* take_free(std::uint64_t bytes) STRANDLINE_REQUIRES(mutex_);
  void add_free(std::byte* data, std::uint64_t bytes) STRANDLINE_REQUIRES(mutex_);
  void remove_free(std::byte* data, std::uint64_t bytes) STRANDLINE_REQUIRES(mutex_);

  // Constant after construction.
  const bool fixed_;
  const DefaultCeiling default_ceiling_;
  const std::function<Result<HostMemory>()> host_memory_;
  const std::uint64_t fork_generation_;

  mutable base::Mutex mutex_;
  base::ConditionVariable returned_;
  std::uint64_t bytes_max_ STRANDLINE_GUARDED_BY(mutex_);
  std::uint64_t bytes_mapped_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  std::uint64_t bytes_in_use_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  // The same free ranges twice: by address for joining, by size for the best fit.
  std::map<std::byte*, std::uint64_t> free_ STRANDLINE_GUARDED_BY(mutex_);
  std::set<std::pair<std::uint64_t, std::byte*>> free_by_size_ STRANDLINE_GUARDED_BY(mutex_);
};

class LeasedRange {
 public:
  LeasedRange(std::shared_ptr<Arena> arena, std::byte* data, std::uint64_t bytes)
      : arena_(std::move(arena)), data_(data), bytes_(bytes) {}
  ~LeasedRange() {
    if (data_ != nullptr) arena_->give_back(data_, base::round_up(bytes_, kPageBytes));
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

namespace {

Error never_fits(std::uint64_t total, std::uint64_t bytes_max) {
  return Error{.code = ErrorCode::kMemoryLimit,
               .message = "cannot stage " + std::to_string(total) +
                          " bytes at once: the host memory ceiling (host_bytes_max) is " +
                          std::to_string(bytes_max) + " bytes; raise it or save less"};
}

Error too_little_free(std::uint64_t growth, const HostMemory& memory) {
  std::string cgroup = "no memory cgroup limits it";
  if (!memory.cgroup.empty()) {
    cgroup = "its memory cgroup " + memory.cgroup + " has " +
             std::to_string(memory.cgroup_bytes_free) + " bytes free";
  }
  return Error{.code = ErrorCode::kMemoryLimit,
               .message = "cannot map another " + std::to_string(growth) +
                          " bytes of staging memory: the host has " +
                          std::to_string(memory.host_bytes_free) + " bytes available and " +
                          cgroup + "; free memory, or lower host_bytes_max to stage in waves"};
}

Error timed_out(std::uint64_t total, std::uint64_t in_use, std::uint64_t bytes_max) {
  return Error{.code = ErrorCode::kTimeout,
               .message = "there was no room for " + std::to_string(total) +
                          " bytes of staging memory: earlier snapshots hold " +
                          std::to_string(in_use) + " of " + std::to_string(bytes_max) +
                          " bytes; save less often, or raise host_bytes_max, or memory_wait if "
                          "saves may wait"};
}

}  // namespace

Arena::~Arena() {
  if (base::fork_generation() != fork_generation_) return;  // Not mapped in a forked child.
  base::MutexLock lock(mutex_);
  for (const auto& [data, bytes] : free_) ::munmap(data, bytes);
}

Status Arena::adapt(std::uint64_t state_bytes) {
  base::MutexLock lock(mutex_);
  if (fixed_) return {};
  constexpr std::uint64_t kAll = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t wanted = base::checked_mul(state_bytes, 2).value_or(kAll);
  if (default_ceiling_ == DefaultCeiling::kHalfOfFree) {
    // Free memory is read only when the state does not fit beside what is held.
    wanted = base::checked_add(state_bytes, bytes_in_use_).value_or(kAll);
    if (wanted > bytes_max_) wanted = kAll;
  }
  if (wanted <= bytes_max_) return {};
  Result<HostMemory> memory = host_memory_();
  if (!memory) return failure(std::move(memory).error());
  const std::uint64_t free_bytes =
      base::checked_add(memory->bytes_free(), bytes_mapped_).value_or(memory->bytes_free());
  const std::uint64_t affordable = free_bytes / 2 / kPageBytes * kPageBytes;
  bytes_max_ = std::max(bytes_max_, std::min(wanted, affordable));
  return {};
}

Result<std::vector<std::byte*>> Arena::take(const std::vector<std::uint64_t>& sizes,
                                            base::Wait& wait) {
  std::uint64_t total = 0;
  for (const std::uint64_t bytes : sizes) {
    total = base::checked_add(total, bytes).value_or(std::numeric_limits<std::uint64_t>::max());
  }
  std::vector<std::byte*> ranges(sizes.size(), nullptr);
  base::MutexLock lock(mutex_);
  while (true) {
    if (total > bytes_max_) return failure(never_fits(total, bytes_max_));
    if (total <= bytes_max_ - std::min(bytes_in_use_, bytes_max_)) {
      Refusal refusal;
      if (try_take(sizes, ranges, refusal)) {
        bytes_in_use_ += total;
        return ranges;
      }
      if (refusal) return failure(*std::move(refusal));
    }
    if (wait.expired()) return failure(timed_out(total, bytes_in_use_, bytes_max_));
    STRANDLINE_RETURN_IF_ERROR(wait.pause(returned_, mutex_));
  }
}

// Fills `ranges`, or leaves everything as it was.
bool Arena::try_take(const std::vector<std::uint64_t>& sizes, std::vector<std::byte*>& ranges,
                     Refusal& refusal) {
  // The largest first: small ones must not cut up the ranges that large ones fit.
  std::vector<std::size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return sizes[a] > sizes[b]; });
  for (const std::size_t i : order) {
    if (sizes[i] > 0) ranges[i] = take_free(sizes[i]);
  }
  if (map_missing(sizes, ranges, refusal)) return true;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (ranges[i] != nullptr) add_free(std::exchange(ranges[i], nullptr), sizes[i]);
  }
  return false;
}

bool Arena::map_missing(const std::vector<std::uint64_t>& sizes, std::vector<std::byte*>& ranges,
                        Refusal& refusal) {
  std::uint64_t new_bytes = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > 0 && ranges[i] == nullptr) new_bytes += sizes[i];
  }
  if (new_bytes == 0) return true;
  if (!make_room(new_bytes, refusal)) return false;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0 || ranges[i] != nullptr) continue;
    void* mapped =
        ::mmap(nullptr, sizes[i], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
      const int error = errno;
      refusal = base::system_error("map " + std::to_string(sizes[i]) + " bytes of",
                                   "staging memory", error);
      refusal->code = ErrorCode::kMemoryLimit;
      refusal->path.clear();
      return false;
    }
    // Best effort: an old kernel without it only makes forks dearer.
    ::madvise(mapped, sizes[i], MADV_DONTFORK);
    bytes_mapped_ += sizes[i];
    ranges[i] = static_cast<std::byte*>(mapped);
  }
  return true;
}

// Unmaps as many free pages as it takes to map `new_bytes` under the ceiling and within what host
// and cgroup have free.
bool Arena::make_room(std::uint64_t new_bytes, Refusal& refusal) {
  Result<HostMemory> memory = host_memory_();
  if (!memory) {
    refusal = std::move(memory).error();
    return false;
  }
  const std::uint64_t headroom =
      std::min(bytes_max_ - std::min(bytes_mapped_, bytes_max_), memory->bytes_free());
  const std::uint64_t excess = new_bytes > headroom ? new_bytes - headroom : 0;
  std::uint64_t free_bytes = 0;
  for (const auto& [data, bytes] : free_) free_bytes += bytes;
  if (excess > free_bytes) {
    // Would it fit if every lease came back? Then waiting helps. (Under the ceiling alone it always
    // fits: the caller has checked.)
    if (excess > free_bytes + bytes_in_use_) {
      refusal = too_little_free(new_bytes - free_bytes, *memory);
    }
    return false;
  }
  unmap_free(base::round_up(excess, kPageBytes));
  return true;
}

// REQUIRES: at least `bytes` are free.
void Arena::unmap_free(std::uint64_t bytes) {
  // The smallest first: they are the least likely to fit anything.
  while (bytes > 0) {
    const auto [range_bytes, data] = *free_by_size_.begin();
    const std::uint64_t cut = std::min(range_bytes, bytes);
    remove_free(data, range_bytes);
    if (cut < range_bytes) add_free(data, range_bytes - cut);
    ::munmap(data + (range_bytes - cut), cut);
    bytes_mapped_ -= cut;
    bytes -= cut;
  }
}

std::byte* Arena::take_free(std::uint64_t bytes) {
  const auto found = free_by_size_.lower_bound({bytes, nullptr});
  if (found == free_by_size_.end()) return nullptr;
  const auto [range_bytes, data] = *found;
  remove_free(data, range_bytes);
  if (range_bytes > bytes) add_free(data + bytes, range_bytes - bytes);
  return data;
}

void Arena::add_free(std::byte* data, std::uint64_t bytes) {
  const auto next = free_.lower_bound(data);
  if (next != free_.begin()) {
    const auto [previous_data, previous_bytes] = *std::prev(next);
    if (previous_data + previous_bytes == data) {
      remove_free(previous_data, previous_bytes);
      data = previous_data;
      bytes += previous_bytes;
    }
  }
  if (next != free_.end() && data + bytes == next->first) {
    const auto [next_data, next_bytes] = *next;
    remove_free(next_data, next_bytes);
    bytes += next_bytes;
  }
  free_.emplace(data, bytes);
  free_by_size_.emplace(bytes, data);
}

void Arena::remove_free(std::byte* data, std::uint64_t bytes) {
  free_.erase(data);
  free_by_size_.erase({bytes, data});
}

void Arena::give_back(std::byte* data, std::uint64_t bytes) {
  if (base::fork_generation() != fork_generation_) return;  // The lock may be held for ever there.
  {
    base::MutexLock lock(mutex_);
    bytes_in_use_ -= bytes;
    add_free(data, bytes);
  }
  returned_.notify_all();
}

std::byte* Lease::data() const { return range_ == nullptr ? nullptr : range_->data(); }

std::uint64_t Lease::bytes() const { return range_ == nullptr ? 0 : range_->bytes(); }

Slab::Slab(Options options) : arena_(std::make_shared<Arena>(std::move(options))) {}
Slab::~Slab() = default;

Status Slab::adapt(std::uint64_t state_bytes) { return arena_->adapt(state_bytes); }

Result<std::vector<Lease>> Slab::lease(std::span<const std::uint64_t> sizes, base::Wait& wait) {
  std::vector<std::uint64_t> rounded;
  rounded.reserve(sizes.size());
  for (const std::uint64_t bytes : sizes) {
    if (bytes > std::numeric_limits<std::uint64_t>::max() - kPageBytes) {
      return failure(never_fits(bytes, arena_->bytes_max()));
    }
    rounded.push_back(base::round_up(bytes, kPageBytes));
  }
  Result<std::vector<std::byte*>> ranges = arena_->take(rounded, wait);
  if (!ranges) return failure(std::move(ranges).error());
  std::vector<Lease> leases(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    leases[i].range_ = std::make_shared<const LeasedRange>(arena_, (*ranges)[i], sizes[i]);
  }
  return leases;
}

void Slab::unmap_free() { arena_->unmap_all_free(); }
std::uint64_t Slab::host_bytes_max() const { return arena_->bytes_max(); }
std::uint64_t Slab::bytes_mapped() const { return arena_->bytes_mapped(); }
std::uint64_t Slab::bytes_in_use() const { return arena_->bytes_in_use(); }

}  // namespace strandline::memory
