#include "testing/manual_executor.h"

#include <utility>

namespace strandline::testing {

void ManualExecutor::post(std::function<void()> task) {
  base::MutexLock lock(mutex_);
  tasks_.push_back(std::move(task));
}

bool ManualExecutor::run_one() {
  std::function<void()> task;
  {
    base::MutexLock lock(mutex_);
    if (tasks_.empty()) return false;
    task = std::move(tasks_.front());
    tasks_.pop_front();
  }
  task();
  return true;
}

std::size_t ManualExecutor::run_all() {
  std::size_t count = 0;
  while (run_one()) ++count;
  return count;
}

std::size_t ManualExecutor::queued() const {
  base::MutexLock lock(mutex_);
  return tasks_.size();
}

}  // namespace strandline::testing
