// How long a call may be kept waiting, and who may end that sooner.
#pragma once

#include <chrono>
#include <functional>

#include "base/clock.h"
#include "base/mutex.h"
#include "strandline/error.h"

namespace strandline::base {

// How often a waiting call asks whether it was interrupted: short for a person who pressed Ctrl-C,
// long for a processor.
inline constexpr std::chrono::milliseconds kInterruptPoll{100};

// Thread-safety: none; it belongs to the call that waits. Deadlines are real time.
class Wait {
 public:
  // `interrupted` may be null. It is called on the waiting thread, without any lock of the waiter,
  // and may run anything, such as the handlers of signals.
  explicit Wait(Clock::Instant deadline, std::function<bool()> interrupted = {});

  [[nodiscard]] bool expired() const { return std::chrono::steady_clock::now() >= deadline_; }

  // Waits until `condition` is notified, but not beyond the deadline or `no_later_than`, nor beyond
  // the time to ask for an interruption. Fails with kUnavailable once interrupted. Gives `mutex` up
  // meanwhile, so that what is waited for must be looked at again:
  //
  //   while (!ready_) {
  //     if (wait.expired()) return failure(ErrorCode::kTimeout, "…");
  //     STRANDLINE_RETURN_IF_ERROR(wait.pause(changed_, mutex_));
  //   }
  [[nodiscard]] Status pause(ConditionVariable& condition, Mutex& mutex,
                             Clock::Instant no_later_than = Clock::Instant::max())
      STRANDLINE_REQUIRES(mutex);

 private:
  const Clock::Instant deadline_;
  const std::function<bool()> interrupted_;
  Clock::Instant next_poll_;
};

}  // namespace strandline::base
