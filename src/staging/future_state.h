// What all copies of a Future share, and how the engine ends it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/fork.h"
#include "base/mutex.h"
#include "strandline/error.h"
#include "strandline/future.h"

namespace strandline::inline v0 {

// The engine holds the state, users hold handles of it. When the last handle has gone the result
// goes, though the engine may still be on its way out of end(): staged memory that nobody can reach
// must not count as held, not even for that moment.
//
// Thread-safety: thread-safe. In a forked child one that has not ended never will, and its lock may
// be held for ever: there it counts as failed with kUnavailable.
template <typename T>
struct Future<T>::State {
 public:
  using Callback = std::function<void(const Result<T>&)>;

  // A future of this state. REQUIRES: called once; its copies are all handles that there are.
  [[nodiscard]] static Future<T> handle(std::shared_ptr<State> state);

  // Ends the future and runs the callbacks on this thread. REQUIRES: called once.
  void end(Result<T> result) STRANDLINE_EXCLUDES(mutex_);

  [[nodiscard]] bool ended() const { return ended_.load(std::memory_order_acquire); }
  [[nodiscard]] Result<T> get(std::chrono::milliseconds deadline) const STRANDLINE_EXCLUDES(mutex_);
  void then(Callback callback) STRANDLINE_EXCLUDES(mutex_);

 private:
  void drop_result() STRANDLINE_EXCLUDES(mutex_);

  const std::uint64_t fork_generation_ = base::fork_generation();

  // Written before `ended_`, constant from then on until no handle is left; handles read it without
  // the lock.
  std::shared_ptr<const Result<T>> result_;
  std::atomic<bool> ended_{false};

  mutable base::Mutex mutex_;
  mutable base::ConditionVariable changed_;
  std::vector<Callback> callbacks_ STRANDLINE_GUARDED_BY(mutex_);
  bool has_handles_ STRANDLINE_GUARDED_BY(mutex_) = true;
};

}  // namespace strandline::inline v0
