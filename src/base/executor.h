// Where background work runs: owned threads in production, the test's own thread in tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "strandline/error.h"

namespace strandline::base {

// Runs tasks. Thread-safety: thread-safe.
class Executor {
 public:
  virtual ~Executor() = default;

  // Queues a task. Blocks while the queue is full. Tasks must not throw.
  virtual void post(std::function<void()> task) = 0;

  // How many tasks may run at once.
  [[nodiscard]] virtual std::uint32_t concurrency() const = 0;
};

// A fixed number of threads with all signals blocked (signals are the trainer's), serving one
// bounded queue in order. The destructor runs what is queued and joins. In a forked child the
// threads do not exist: the destructor then leaks what it cannot join.
class ThreadExecutor final : public Executor {
 public:
  // Fails with kUnavailable where the system gives no more threads; then those already started
  // have ended. The caller's signal mask is left as it was.
  [[nodiscard]] static Result<std::unique_ptr<ThreadExecutor>> start(std::uint32_t threads,
                                                                     std::size_t queue_max,
                                                                     const char* name);
  ~ThreadExecutor() override;
  ThreadExecutor(const ThreadExecutor&) = delete;
  ThreadExecutor& operator=(const ThreadExecutor&) = delete;

  void post(std::function<void()> task) override STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] std::uint32_t concurrency() const override;

 private:
  explicit ThreadExecutor(std::size_t queue_max);
  void run() STRANDLINE_EXCLUDES(mutex_);

  // Constant after construction.
  const std::size_t queue_max_;
  const std::uint64_t fork_generation_;

  Mutex mutex_;
  ConditionVariable changed_;
  std::deque<std::function<void()>> queue_ STRANDLINE_GUARDED_BY(mutex_);
  bool stopping_ STRANDLINE_GUARDED_BY(mutex_) = false;

  std::vector<std::thread> threads_;  // Touched by start() and the destructor only.
};

}  // namespace strandline::base
