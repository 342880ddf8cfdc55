// An executor whose tasks run when the test says so, on the test's thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>

#include "base/executor.h"
#include "base/mutex.h"

namespace strandline::testing {

// Thread-safety: thread-safe. Its queue is unbounded: post() never blocks. Tasks that are still
// queued at its end are dropped without being run.
class ManualExecutor final : public base::Executor {
 public:
  explicit ManualExecutor(std::uint32_t concurrency = 1) : concurrency_(concurrency) {}

  void post(std::function<void()> task) override STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] std::uint32_t concurrency() const override { return concurrency_; }

  // Runs the oldest task; false if there is none.
  bool run_one() STRANDLINE_EXCLUDES(mutex_);
  // Runs tasks, those posted meanwhile included, until there is none. Returns how many.
  std::size_t run_all() STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] std::size_t queued() const STRANDLINE_EXCLUDES(mutex_);

 private:
  const std::uint32_t concurrency_;
  mutable base::Mutex mutex_;
  std::deque<std::function<void()>> tasks_ STRANDLINE_GUARDED_BY(mutex_);
};

}  // namespace strandline::testing
