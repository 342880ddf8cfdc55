// What one call at a time may do: a mutex that can be waited for with patience, and that knows
// whether the thread has it already.
#pragma once

#include <thread>

#include "base/mutex.h"
#include "base/wait.h"
#include "strandline/error.h"

namespace strandline::base {

// Thread-safety: thread-safe.
class Turns {
 public:
  // Whether this thread is inside a turn; so it is in code that a wait's `interrupted` runs.
  [[nodiscard]] bool held_by_this_thread() const STRANDLINE_EXCLUDES(mutex_);

 private:
  friend class Turn;
  mutable Mutex mutex_;
  ConditionVariable ended_;
  std::thread::id holder_ STRANDLINE_GUARDED_BY(mutex_);  // No thread: nobody.
};

// One turn, ended by its destructor. Thread-safety: none; begun and ended by one thread.
class Turn {
 public:
  explicit Turn(Turns& turns) : turns_(turns) {}
  ~Turn() { end(); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  // Waits until nobody else has a turn. Fails with kTimeout and the message `in_vain` at the
  // deadline, and with kUnavailable once interrupted. REQUIRES: !held_by_this_thread().
  [[nodiscard]] Status begin(Wait& wait, const char* in_vain);
  void end();

 private:
  Turns& turns_;
  bool held_ = false;
};

}  // namespace strandline::base
