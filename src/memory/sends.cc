// Between describing memory to another process and that one's attaching it, nobody else may hold
// it: the trainer has dropped the result after sending it, and the other process is still starting.
// So the sender keeps it until the table says that as many have attached as were sent, for a minute
// at most, since a message may be lost.
//
// Who looks? Whoever leases memory does, so that memory is found free as soon as it is; but after
// its last staging a job may never call again, and gigabytes would stay. So there is a thread while
// something is kept, which is seldom and short. It needs nothing of the other process.
//
// Rejected: a message back from the receiver (a thread that waits for it, and a socket more), the
// receiver taking the memory over (it may never come).

#include "memory/sends.h"

#include <pthread.h>
#include <signal.h>

#include <system_error>

namespace strandline::memory {

Sends::Sends() = default;

Sends::~Sends() { stop(); }

void Sends::keep(const void* source, std::uint64_t generation, std::shared_ptr<const void> keep,
                 std::function<bool()> claimed) {
  Kept kept{.keep = std::move(keep),
            .claimed = std::move(claimed),
            .until = std::chrono::steady_clock::now() + kClaimWait};
  // Swapped, so that what was kept before is let go of after the lock.
  base::MutexLock lock(mutex_);
  const auto [at, added] = kept_.try_emplace({source, generation});
  std::swap(at->second, kept);
  if (!running_ && !stopping_) start_thread();
}

void Sends::start_thread() {
  if (thread_.joinable()) thread_.join();  // It has ended, or is about to without the lock.
  // New threads inherit the mask; signals are not for this one.
  sigset_t all;
  sigset_t previous;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &previous);
  try {
    thread_ = std::thread([this] { run(); });
    pthread_setname_np(thread_.native_handle(), "strandline-send");
    running_ = true;
  } catch (const std::system_error&) {
    running_ = false;  // Then later calls sweep.
  }
  pthread_sigmask(SIG_SETMASK, &previous, nullptr);
}

void Sends::run() {
  while (true) {
    Released released;  // Let go of after the lock, which ends first.
    base::MutexLock lock(mutex_);
    if (stopping_ || kept_.empty()) {
      running_ = false;
      return;
    }
    stopped_.wait_until(mutex_, std::chrono::steady_clock::now() + kClaimPoll);
    release(std::chrono::steady_clock::now(), released);
  }
}

void Sends::release(base::Clock::Instant now, Released& released) {
  for (auto at = kept_.begin(); at != kept_.end();) {
    if (at->second.claimed() || now >= at->second.until) {
      released.push_back(std::move(at->second.keep));
      at = kept_.erase(at);
    } else {
      ++at;
    }
  }
}

void Sends::sweep(base::Clock::Instant now) {
  Released released;
  base::MutexLock lock(mutex_);
  release(now, released);
}

void Sends::stop() {
  std::thread ending;
  {
    base::MutexLock lock(mutex_);
    stopping_ = true;
    ending = std::move(thread_);
  }
  stopped_.notify_all();
  if (ending.joinable()) ending.join();
  base::MutexLock lock(mutex_);
  stopping_ = false;
}

std::size_t Sends::size() const {
  base::MutexLock lock(mutex_);
  return kept_.size();
}

}  // namespace strandline::memory
