#include "base/executor.h"

#include <pthread.h>
#include <signal.h>

#include <utility>

#include "base/fork.h"

namespace strandline::base {

ThreadExecutor::ThreadExecutor(std::uint32_t threads, std::size_t queue_max, const char* name)
    : queue_max_(queue_max), fork_generation_(fork_generation()) {
  // New threads inherit the signal mask, so block everything around their creation.
  sigset_t all;
  sigset_t previous;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &previous);
  for (std::uint32_t i = 0; i < threads; ++i) {
    threads_.emplace_back([this] { run(); });
    pthread_setname_np(threads_.back().native_handle(), name);
  }
  pthread_sigmask(SIG_SETMASK, &previous, nullptr);
}

ThreadExecutor::~ThreadExecutor() {
  if (fork_generation() != fork_generation_) {
    // A forked child: joining would wait for threads that do not exist.
    static_cast<void>(new std::vector<std::thread>(std::move(threads_)));
    return;
  }
  {
    MutexLock lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadExecutor::post(std::function<void()> task) {
  {
    MutexLock lock(mutex_);
    while (queue_.size() >= queue_max_) changed_.wait(mutex_);
    queue_.push_back(std::move(task));
  }
  changed_.notify_all();
}

std::uint32_t ThreadExecutor::concurrency() const {
  return static_cast<std::uint32_t>(threads_.size());
}

void ThreadExecutor::run() {
  while (true) {
    std::function<void()> task;
    {
      MutexLock lock(mutex_);
      while (queue_.empty() && !stopping_) changed_.wait(mutex_);
      if (queue_.empty()) return;
      task = std::move(queue_.front());
      queue_.pop_front();
    }
    changed_.notify_all();
    task();
  }
}

}  // namespace strandline::base
