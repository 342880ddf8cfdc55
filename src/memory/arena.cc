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
// leases outlive the Slab. Free ranges are unmapped when the last of Slab and leases is gone. A
// range that nobody here holds any more may still be held by another process (shared_pages.cc):
// then it is lent, counts as in use, and is asked about at each request and while one waits.
//
// Fork. Private ranges are not inherited (MADV_DONTFORK) unless a user sees them: data-loader
// workers forked by the trainer would otherwise share the pages copy-on-write, and every later
// generation would be copied page by page by the kernel. In a forked child returning a lease does
// nothing.
//
// Concurrency. One mutex, given up while the kernel allocates pages for a new range, which takes
// seconds for gigabytes: nobody may wait for that who only drops a result. Waiters sleep on one
// condition variable, woken by every return. They are not served in order of arrival: a waiter for
// much memory at the head of a queue would block the next wave of a snapshot whose earlier waves it
// is waiting for.
//
// Rejected: a buddy allocator (rounds gigabytes up to powers of two), one region per generation
// (sizes that change leave regions that fit nothing), malloc (unaligned, and its budget is opaque).

#include "memory/arena.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "base/checked_math.h"
#include "base/fork.h"
#include "base/result_macros.h"
#include "memory/shared_pages.h"

namespace strandline::memory {
namespace {

// How often a waiting request asks whether other processes have let go of memory: their locks wake
// nobody. Nobody who waits for gigabytes notices less.
constexpr std::chrono::milliseconds kLentPoll{100};

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

Error too_many_pieces(std::size_t pieces, std::size_t places) {
  return Error{.code = ErrorCode::kMemoryLimit,
               .message = "cannot stage " + std::to_string(pieces) +
                          " pieces at once into shared memory, which has " +
                          std::to_string(places) + " places; stage fewer"};
}

Error no_places(std::size_t held) {
  return Error{.code = ErrorCode::kTimeout,
               .message =
                   "there was no place left in shared staging memory: earlier snapshots hold "
                   "all " +
                   std::to_string(held) + "; drop some"};
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

Arena::Arena(Slab::Options options)
    : fixed_(options.host_bytes_max.has_value()),
      default_ceiling_(options.default_ceiling),
      host_memory_(std::move(options.host_memory)),
      fork_generation_(base::fork_generation()),
      pages_(options.shared ? std::make_unique<SharedPages>()
                            : make_private_pages(options.inherited)),
      shared_pages_(options.shared ? static_cast<SharedPages*>(pages_.get()) : nullptr),
      bytes_max_(options.host_bytes_max.value_or(0)) {}

Arena::~Arena() {
  if (base::fork_generation() != fork_generation_) return;  // The parent's, or not mapped here.
  base::MutexLock lock(mutex_);
  unmap_free(free_.bytes());
}

const std::string& Arena::id() const { return shared_pages_->id(); }

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
  STRANDLINE_ASSIGN_OR_RETURN(Taken taken, reserve(sizes, wait));
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (!taken.fresh[i]) continue;
    if (Status backed = pages_->back(taken.ranges[i], sizes[i]); !backed) {
      undo(sizes, taken);
      return failure(std::move(backed).error());
    }
  }
  return std::move(taken.ranges);
}

Result<Arena::Taken> Arena::reserve(const std::vector<std::uint64_t>& sizes, base::Wait& wait) {
  std::uint64_t total = 0;
  std::size_t pieces = 0;
  for (const std::uint64_t bytes : sizes) {
    total = base::checked_add(total, bytes).value_or(std::numeric_limits<std::uint64_t>::max());
    if (bytes > 0) ++pieces;
  }
  Taken taken{.ranges = std::vector<std::byte*>(sizes.size(), nullptr),
              .fresh = std::vector<bool>(sizes.size(), false)};
  base::MutexLock lock(mutex_);
  while (true) {
    if (total > bytes_max_) return failure(never_fits(total, bytes_max_));
    if (lent_ > 0) close_lent();
    const bool has_places = pieces <= pages_->places_free();
    if (!has_places && pieces - pages_->places_free() > leased_.size()) {
      return failure(too_many_pieces(pieces, pages_->places_free() + leased_.size()));
    }
    if (has_places && total <= bytes_max_ - std::min(bytes_in_use_, bytes_max_)) {
      Refusal refusal;
      if (try_take(sizes, taken, refusal)) {
        record(sizes, taken);
        return taken;
      }
      if (refusal) return failure(*std::move(refusal));
    }
    if (wait.expired()) {
      if (!has_places) return failure(no_places(leased_.size()));
      return failure(timed_out(total, bytes_in_use_, bytes_max_));
    }
    const auto poll =
        lent_ > 0 ? std::chrono::steady_clock::now() + kLentPoll : base::Clock::Instant::max();
    STRANDLINE_RETURN_IF_ERROR(wait.pause(returned_, mutex_, poll));
  }
}

// Fills `taken`, or leaves everything as it was.
bool Arena::try_take(const std::vector<std::uint64_t>& sizes, Taken& taken, Refusal& refusal) {
  // The largest first: small ones must not cut up the ranges that large ones fit.
  std::vector<std::size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return sizes[a] > sizes[b]; });
  for (const std::size_t i : order) {
    if (sizes[i] > 0) taken.ranges[i] = free_.take(sizes[i]);
  }
  if (map_missing(sizes, taken, refusal)) return true;
  put_back(sizes, taken);
  return false;
}

bool Arena::map_missing(const std::vector<std::uint64_t>& sizes, Taken& taken, Refusal& refusal) {
  std::uint64_t new_bytes = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (taken.ranges[i] == nullptr) new_bytes += sizes[i];
  }
  if (new_bytes == 0) return true;
  if (!make_room(new_bytes, refusal)) return false;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0 || taken.ranges[i] != nullptr) continue;
    Result<std::byte*> mapped = pages_->map(sizes[i]);
    if (!mapped && free_.bytes() > 0) {
      // Free ranges may lie scattered in the addresses that are left.
      unmap_free(free_.bytes());
      mapped = pages_->map(sizes[i]);
    }
    if (!mapped) {
      refusal = std::move(mapped).error();
      return false;
    }
    bytes_mapped_ += sizes[i];
    taken.ranges[i] = *mapped;
    taken.fresh[i] = true;
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
  const std::uint64_t free_bytes = free_.bytes();
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
  while (bytes > 0) {
    const FreeRanges::Range range = free_.take_from_smallest(bytes);
    pages_->unmap(range.data, range.bytes);
    bytes_mapped_ -= range.bytes;
    bytes -= range.bytes;
  }
}

void Arena::record(const std::vector<std::uint64_t>& sizes, const Taken& taken) {
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (taken.ranges[i] == nullptr) continue;
    leased_.emplace(taken.ranges[i], Leased{.bytes = sizes[i], .holders = 1});
    pages_->open(taken.ranges[i], sizes[i]);
    bytes_in_use_ += sizes[i];
  }
}

// The contrary of try_take().
void Arena::put_back(const std::vector<std::uint64_t>& sizes, Taken& taken) {
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    std::byte* const data = std::exchange(taken.ranges[i], nullptr);
    if (data == nullptr) continue;
    if (taken.fresh[i]) {
      pages_->unmap(data, sizes[i]);
      bytes_mapped_ -= sizes[i];
    } else {
      free_.add(data, sizes[i]);
    }
    taken.fresh[i] = false;
  }
}

// The kernel has no pages for what was taken.
void Arena::undo(const std::vector<std::uint64_t>& sizes, Taken& taken) {
  {
    base::MutexLock lock(mutex_);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      if (taken.ranges[i] == nullptr) continue;
      pages_->cancel(taken.ranges[i]);
      leased_.erase(taken.ranges[i]);
      bytes_in_use_ -= sizes[i];
    }
    put_back(sizes, taken);
  }
  returned_.notify_all();
}

void Arena::retire() {
  base::MutexLock lock(mutex_);
  retired_ = true;
  unmap_free(free_.bytes());
}

void Arena::give_back(std::byte* data) {
  if (base::fork_generation() != fork_generation_) return;  // The lock may be held for ever there.
  {
    base::MutexLock lock(mutex_);
    const auto leased = leased_.find(data);
    if (--leased->second.holders > 0) return;
    ++lent_;
    if (close(data, leased->second.bytes)) leased_.erase(leased);
    if (retired_) unmap_free(free_.bytes());
  }
  returned_.notify_all();
}

// What is lent becomes free if no other process holds it any more.
bool Arena::close(std::byte* data, std::uint64_t bytes) {
  if (!pages_->close(data)) return false;
  --lent_;
  bytes_in_use_ -= bytes;
  free_.add(data, bytes);
  return true;
}

void Arena::close_lent() {
  for (auto leased = leased_.begin(); leased != leased_.end();) {
    const auto& [data, range] = *leased;
    const bool closed = range.holders == 0 && close(data, range.bytes);
    leased = closed ? leased_.erase(leased) : std::next(leased);
  }
}

std::optional<Result<Shared>> Arena::share(const std::byte* data, std::uint64_t bytes) {
  std::byte* begin = nullptr;
  std::uint64_t leased_bytes = 0;
  Generation generation;
  {
    base::MutexLock lock(mutex_);
    auto leased = leased_.upper_bound(const_cast<std::byte*>(data));
    if (leased == leased_.begin()) return std::nullopt;
    --leased;
    begin = leased->first;
    leased_bytes = leased->second.bytes;
    const auto offset = static_cast<std::uint64_t>(data - begin);
    if (offset >= leased_bytes) return std::nullopt;
    if (bytes == 0 || bytes > leased_bytes - offset || leased->second.holders == 0) {
      return failure(not_shared());
    }
    ++leased->second.holders;
    generation = shared_pages_->generation_at(begin);
    shared_pages_->table().count_sent(generation.number);
  }
  GenerationTable table = shared_pages_->table();
  return Shared{
      .range = {.pid = ::getpid(),
                .descriptor = shared_pages_->descriptor(),
                .slab = shared_pages_->id(),
                .generation = generation.number,
                .offset = generation.offset + static_cast<std::uint64_t>(data - begin),
                .bytes = bytes},
      .keep = std::make_shared<const LeasedRange>(shared_from_this(), begin, leased_bytes),
      .claimed = [table, number = generation.number] { return table.all_claimed(number); }};
}

Result<AttachedMemory> Arena::attach(const SharedRange& range) {
  std::byte* begin = nullptr;
  Generation generation;
  {
    base::MutexLock lock(mutex_);
    begin = shared_pages_->find(range.generation);
    if (begin == nullptr) return failure(used_again(range));
    generation = shared_pages_->generation_at(begin);
    if (!lies_within(range, generation)) return failure(out_of_bounds(range));
    if (leased_.find(begin)->second.holders++ == 0) --lent_;
    shared_pages_->table().count_claimed(range.generation);
  }
  return AttachedMemory{.data = begin + (range.offset - generation.offset),
                        .bytes = range.bytes,
                        .keep_alive = std::make_shared<const LeasedRange>(shared_from_this(), begin,
                                                                          generation.bytes)};
}

}  // namespace strandline::memory
