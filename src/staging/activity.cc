#include "staging/activity.h"

namespace strandline::staging {

std::shared_ptr<const void> Activity::begin() {
  {
    base::MutexLock lock(mutex_);
    if (closed_) return nullptr;
    ++running_;
  }
  return {this, [self = shared_from_this()](const void*) { self->end(); }};
}

void Activity::end() {
  base::MutexLock lock(mutex_);
  if (--running_ == 0) idle_.notify_all();
}

void Activity::close() {
  base::MutexLock lock(mutex_);
  closed_ = true;
}

bool Activity::wait_until_idle(base::Clock::Instant deadline) {
  base::MutexLock lock(mutex_);
  while (running_ > 0) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    idle_.wait_until(mutex_, deadline);
  }
  return true;
}

}  // namespace strandline::staging
