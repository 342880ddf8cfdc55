#include "memory/exchange.h"

#include <atomic>
#include <utility>

#include "base/fork.h"
#include "memory/attached_slab.h"

namespace strandline::memory {
namespace {

struct OfProcess {
  std::uint64_t fork_generation = 0;
  OfProcess* parents = nullptr;
  Exchange exchange;
};

// Never destroyed: threads and objects may outlive static destruction. In a forked child the
// parent's stays as it was, for its locks may be held for ever there and its thread does not exist.
constinit std::atomic<OfProcess*> current{nullptr};

// Joins the thread at the end of the process, if it still runs.
struct AtExit {
  AtExit() = default;
  ~AtExit() {
    OfProcess* const process = current.load();
    if (process != nullptr && process->fork_generation == base::fork_generation()) {
      process->exchange.sends().stop();
    }
  }
  AtExit(const AtExit&) = delete;
  AtExit& operator=(const AtExit&) = delete;
};
const AtExit kAtExit;

}  // namespace

Exchange& exchange() {
  const std::uint64_t generation = base::fork_generation();
  OfProcess* process = current.load();
  while (process == nullptr || process->fork_generation != generation) {
    auto made = std::make_unique<OfProcess>();
    made->fork_generation = generation;
    made->parents = process;
    if (current.compare_exchange_strong(process, made.get())) process = made.release();
  }
  return process->exchange;
}

bool lies_within(const SharedRange& range, const Generation& generation) {
  return range.bytes > 0 && range.bytes <= generation.bytes && range.offset >= generation.offset &&
         range.offset - generation.offset <= generation.bytes - range.bytes;
}

Error not_shared() {
  return Error{.code = ErrorCode::kInvalidArgument,
               .message =
                   "this memory cannot be shared: it is not (any more) part of a result that "
                   "this process staged with share_memory, or attached; stage it so, or "
                   "send a copy"};
}

Error out_of_bounds(const SharedRange& range) {
  return Error{.code = ErrorCode::kInvalidArgument,
               .message = "cannot attach " + std::to_string(range.bytes) + " bytes at offset " +
                          std::to_string(range.offset) + " of the shared memory " + range.slab +
                          ": they do not lie within its generation " +
                          std::to_string(range.generation) + "; pass on what share() returned"};
}

Error used_again(const SharedRange& range) {
  return Error{.code = ErrorCode::kNotFound,
               .message = "the shared memory " + range.slab + " holds its generation " +
                          std::to_string(range.generation) + " no more: process " +
                          std::to_string(range.pid) +
                          " has dropped it, and a minute has passed or another process received "
                          "the same message; hold results until all have received them"};
}

void Exchange::add(std::string slab, const std::shared_ptr<SharedSource>& source) {
  base::MutexLock lock(mutex_);
  add_locked(std::move(slab), source);
}

void Exchange::add_locked(std::string slab, const std::shared_ptr<SharedSource>& source) {
  std::erase_if(known_, [](const Known& known) { return known.source.expired(); });
  known_.push_back({.slab = std::move(slab), .source = source});
}

Result<SharedRange> Exchange::share(const std::byte* data, std::uint64_t bytes) {
  std::vector<std::shared_ptr<SharedSource>> sources;  // Ended after the lock.
  {
    base::MutexLock lock(mutex_);
    for (const Known& known : known_) {
      if (auto source = known.source.lock()) sources.push_back(std::move(source));
    }
  }
  for (const std::shared_ptr<SharedSource>& source : sources) {
    std::optional<Result<Shared>> shared = source->share(data, bytes);
    if (!shared) continue;
    if (!*shared) return failure(std::move(*shared).error());
    sends_.keep(source.get(), (*shared)->range.generation, std::move((*shared)->keep),
                std::move((*shared)->claimed));
    return std::move((*shared)->range);
  }
  return failure(not_shared());
}

Result<AttachedMemory> Exchange::attach(const SharedRange& range) {
  std::shared_ptr<SharedSource> source;  // Ended after the lock.
  {
    base::MutexLock lock(mutex_);
    for (const Known& known : known_) {
      if (known.slab == range.slab) source = known.source.lock();
      if (source != nullptr) break;
    }
    if (source == nullptr) {
      // Under the lock, so that no two threads open the same slab.
      Result<std::shared_ptr<AttachedSlab>> opened = AttachedSlab::open(range);
      if (!opened) return failure(std::move(opened).error());
      source = *std::move(opened);
      add_locked(range.slab, source);
    }
  }
  return source->attach(range);
}

}  // namespace strandline::memory
