// What a stager is still busy with when it is to be closed.
#pragma once

#include <cstddef>
#include <memory>

#include "base/clock.h"
#include "base/mutex.h"

namespace strandline::staging {

// Counts stagings from the call of stage() until the last device has finished. Shared with the
// completions of devices, which may outlive the stager. Thread-safety: thread-safe.
class Activity : public std::enable_shared_from_this<Activity> {
 public:
  // One more staging, which ends with the last holder of what this returns. Null after close():
  // then it must not begin.
  [[nodiscard]] std::shared_ptr<const void> begin() STRANDLINE_EXCLUDES(mutex_);

  // From now on none begins.
  void close() STRANDLINE_EXCLUDES(mutex_);

  // Waits until none is running; false at the deadline.
  [[nodiscard]] bool wait_until_idle(base::Clock::Instant deadline) STRANDLINE_EXCLUDES(mutex_);

 private:
  void end() STRANDLINE_EXCLUDES(mutex_);

  base::Mutex mutex_;
  base::ConditionVariable idle_;
  std::size_t running_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  bool closed_ STRANDLINE_GUARDED_BY(mutex_) = false;
};

}  // namespace strandline::staging
