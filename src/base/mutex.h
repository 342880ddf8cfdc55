// A mutex, its lock and its condition variable that clang's thread-safety analysis understands.
// libstdc++'s std::mutex carries no annotations, so the analysis would cry wolf on it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

#if defined(__clang__)
#define STRANDLINE_THREAD_ANNOTATION(x) __attribute__((x))
#else
#define STRANDLINE_THREAD_ANNOTATION(x)
#endif
#define STRANDLINE_GUARDED_BY(x) STRANDLINE_THREAD_ANNOTATION(guarded_by(x))
#define STRANDLINE_REQUIRES(...) STRANDLINE_THREAD_ANNOTATION(requires_capability(__VA_ARGS__))
#define STRANDLINE_EXCLUDES(...) STRANDLINE_THREAD_ANNOTATION(locks_excluded(__VA_ARGS__))

namespace strandline::base {

class STRANDLINE_THREAD_ANNOTATION(capability("mutex")) Mutex {
 public:
  void lock() STRANDLINE_THREAD_ANNOTATION(acquire_capability()) { mutex_.lock(); }
  void unlock() STRANDLINE_THREAD_ANNOTATION(release_capability()) { mutex_.unlock(); }

 private:
  friend class ConditionVariable;
  std::mutex mutex_;
};

class STRANDLINE_THREAD_ANNOTATION(scoped_lockable) MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) STRANDLINE_THREAD_ANNOTATION(acquire_capability(mutex))
      : mutex_(mutex) {
    mutex_.lock();
  }
  ~MutexLock() STRANDLINE_THREAD_ANNOTATION(release_capability()) { mutex_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

// REQUIRES in every wait: the calling thread holds `mutex`.
class ConditionVariable {
 public:
  void notify_one() { condition_.notify_one(); }
  void notify_all() { condition_.notify_all(); }

  void wait(Mutex& mutex) STRANDLINE_REQUIRES(mutex) {
    std::unique_lock<std::mutex> lock(mutex.mutex_, std::adopt_lock);
    condition_.wait(lock);
    lock.release();
  }

  // Returns false at the deadline.
  bool wait_until(Mutex& mutex, std::chrono::steady_clock::time_point deadline)
      STRANDLINE_REQUIRES(mutex) {
    std::unique_lock<std::mutex> lock(mutex.mutex_, std::adopt_lock);
    const auto status = condition_.wait_until(lock, deadline);
    lock.release();
    return status == std::cv_status::no_timeout;
  }

 private:
  std::condition_variable condition_;
};

}  // namespace strandline::base
