// What all copies of a Future share, and how the engine ends it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "base/fork.h"
#include "base/mutex.h"
#include "strandline/error.h"
#include "strandline/future.h"

namespace strandline::inline v0 {

// Thread-safety: thread-safe. In a forked child one that has not ended never will, and its lock may
// be held for ever: there it counts as failed with kUnavailable.
template <typename T>
struct Future<T>::State {
 public:
  using Callback = std::function<void(const Result<T>&)>;

  // Ends the future and runs the callbacks on this thread. REQUIRES: called once.
  void end(Result<T> result) STRANDLINE_EXCLUDES(mutex_);

  [[nodiscard]] bool ended() const { return ended_.load(std::memory_order_acquire); }
  [[nodiscard]] Result<T> get(std::chrono::milliseconds deadline) const STRANDLINE_EXCLUDES(mutex_);
  void then(Callback callback) STRANDLINE_EXCLUDES(mutex_);

 private:
  const std::uint64_t fork_generation_ = base::fork_generation();

  // Written once before `ended_`, constant afterwards.
  std::optional<Result<T>> result_;
  std::atomic<bool> ended_{false};

  mutable base::Mutex mutex_;
  mutable base::ConditionVariable changed_;
  std::vector<Callback> callbacks_ STRANDLINE_GUARDED_BY(mutex_);
};

}  // namespace strandline::inline v0
