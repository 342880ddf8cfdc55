#include "base/turn.h"

#include <utility>

#include "base/result_macros.h"

namespace strandline::base {

bool Turns::held_by_this_thread() const {
  MutexLock lock(mutex_);
  return holder_ == std::this_thread::get_id();
}

Status Turn::begin(Wait& wait, const char* in_vain) {
  MutexLock lock(turns_.mutex_);
  while (turns_.holder_ != std::thread::id()) {
    if (wait.expired()) return failure(ErrorCode::kTimeout, in_vain);
    STRANDLINE_RETURN_IF_ERROR(wait.pause(turns_.ended_, turns_.mutex_));
  }
  turns_.holder_ = std::this_thread::get_id();
  held_ = true;
  return {};
}

void Turn::end() {
  if (!std::exchange(held_, false)) return;
  {
    MutexLock lock(turns_.mutex_);
    turns_.holder_ = std::thread::id();
  }
  turns_.ended_.notify_all();
}

}  // namespace strandline::base
