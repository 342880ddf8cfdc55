#include "base/executor.h"

#include <pthread.h>
#include <signal.h>

#include <string>
#include <system_error>
#include <utility>

#include "base/fork.h"

namespace strandline::base {

namespace {

// New threads inherit the signal mask, so everything is blocked around their creation.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &previous_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t previous_{};
};

}  // namespace

ThreadExecutor::ThreadExecutor(std::size_t queue_max)
    : queue_max_(queue_max), fork_generation_(fork_generation()) {}

Result<std::unique_ptr<ThreadExecutor>> ThreadExecutor::start(std::uint32_t threads,
                                                              std::size_t queue_max,
                                                              const char* name) {
  std::unique_ptr<ThreadExecutor> executor(new ThreadExecutor(queue_max));
  executor->threads_.reserve(threads);
  const SignalsBlocked blocked;
  for (std::uint32_t i = 0; i < threads; ++i) {
    try {
      executor->threads_.emplace_back([self = executor.get()] { self->run(); });
    } catch (const std::system_error& error) {
      return failure(
          Error{.code = ErrorCode::kUnavailable,
                .message = "cannot start thread " + std::to_string(i + 1) + " of " +
                           std::to_string(threads) + " (" + name + "): " + error.code().message() +
                           "; set copy_threads lower, or raise `ulimit -u` or `ulimit -v`",
                .system_errno = error.code().value()});
    }
    pthread_setname_np(executor->threads_.back().native_handle(), name);
  }
  return executor;
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
