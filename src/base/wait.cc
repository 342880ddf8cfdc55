#include "base/wait.h"

#include <algorithm>
#include <utility>

namespace strandline::base {

Wait::Wait(Clock::Instant deadline, std::function<bool()> interrupted)
    : deadline_(deadline),
      interrupted_(std::move(interrupted)),
      next_poll_(std::chrono::steady_clock::now() + kInterruptPoll) {}

Status Wait::pause(ConditionVariable& condition, Mutex& mutex, Clock::Instant no_later_than) {
  const Clock::Instant until = std::min(deadline_, no_later_than);
  if (!interrupted_) {
    condition.wait_until(mutex, until);
    return {};
  }
  condition.wait_until(mutex, std::min(until, next_poll_));
  // By the clock and not by why it woke: frequent notifications must not put the question off.
  if (std::chrono::steady_clock::now() < next_poll_) return {};
  mutex.unlock();
  const bool ended = interrupted_();
  next_poll_ = std::chrono::steady_clock::now() + kInterruptPoll;
  mutex.lock();
  if (ended) return failure(ErrorCode::kUnavailable, "interrupted while it waited");
  return {};
}

}  // namespace strandline::base
