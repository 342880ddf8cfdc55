// Memory that was described to another process, kept until that one has it.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/mutex.h"

namespace strandline::memory {

// How long memory waits to be claimed: a spawned process first imports what it runs, which takes
// seconds, half a minute on a busy file system. Longer would only keep what was never received.
inline constexpr std::chrono::seconds kClaimWait{60};

// How often it is looked whether memory was claimed: nobody waits for that longer than a person
// notices, and it costs some ten microseconds a second.
inline constexpr std::chrono::milliseconds kClaimPoll{100};

// Thread-safety: thread-safe. While something is kept, one thread looks after it.
class Sends {
 public:
  Sends();
  // Ends the thread. What is still kept is let go of.
  ~Sends();
  Sends(const Sends&) = delete;
  Sends& operator=(const Sends&) = delete;

  // Holds `keep` until `claimed` returns true, or for kClaimWait after the last call with the same
  // `source` and `generation`. `claimed` is called under the lock, `keep` let go of outside it.
  void keep(const void* source, std::uint64_t generation, std::shared_ptr<const void> keep,
            std::function<bool()> claimed) STRANDLINE_EXCLUDES(mutex_);

  // Lets go of what was claimed, and of what has waited for too long at `now`.
  void sweep(base::Clock::Instant now = std::chrono::steady_clock::now())
      STRANDLINE_EXCLUDES(mutex_);

  // Ends the thread; the next keep() starts another.
  void stop() STRANDLINE_EXCLUDES(mutex_);

  [[nodiscard]] std::size_t size() const STRANDLINE_EXCLUDES(mutex_);

 private:
  struct Kept {
    std::shared_ptr<const void> keep;
    std::function<bool()> claimed;
    base::Clock::Instant until;
  };
  using Released = std::vector<std::shared_ptr<const void>>;

  void start_thread() STRANDLINE_REQUIRES(mutex_);
  void run() STRANDLINE_EXCLUDES(mutex_);
  void release(base::Clock::Instant now, Released& released) STRANDLINE_REQUIRES(mutex_);

  mutable base::Mutex mutex_;
  base::ConditionVariable stopped_;
  std::map<std::pair<const void*, std::uint64_t>, Kept> kept_ STRANDLINE_GUARDED_BY(mutex_);
  bool running_ STRANDLINE_GUARDED_BY(mutex_) = false;
  bool stopping_ STRANDLINE_GUARDED_BY(mutex_) = false;
  std::thread thread_ STRANDLINE_GUARDED_BY(mutex_);
};

}  // namespace strandline::memory
