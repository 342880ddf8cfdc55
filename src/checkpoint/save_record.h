// What is known about one save: phases, counters, warnings, and exactly one outcome.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/fork.h"
#include "base/mutex.h"
#include "staging/snapshot.h"
#include "strandline/save.h"

namespace strandline::inline v0 {

// Shared by the Checkpointer, its pipeline and every Save handle. Thread-safety: thread-safe.
class Save::Record {
 public:
  Record(std::int64_t step, std::shared_ptr<const base::Clock> clock);

  [[nodiscard]] std::int64_t step() const { return step_; }
  [[nodiscard]] base::Clock::Instant called() const { return called_; }

  // ---- The engine's side ----

  // The snapshot that progress is read from, from when it is planned on.
  void attach(std::shared_ptr<staging::Snapshot> snapshot) STRANDLINE_EXCLUDES(mutex_);
  // Staging ended; `blocked_since` begins the time that the caller waited.
  void staged(Status status, base::Clock::Instant blocked_since) STRANDLINE_EXCLUDES(mutex_);
  void add_written(std::uint64_t bytes) { bytes_written_.fetch_add(bytes); }
  void warn(std::string text) STRANDLINE_EXCLUDES(mutex_);
  template <typename Change>
  void change_timings(Change change) STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    change(timings_);
  }
  // Fails with kUnavailable (cancelled) once somebody asked for it. After `last_chance` was passed
  // without an error, cancelling has no effect any more.
  [[nodiscard]] Status check_cancelled(bool last_chance = false) STRANDLINE_EXCLUDES(mutex_);
  // Sets the outcome; only the first counts.
  void end(Outcome outcome) STRANDLINE_EXCLUDES(mutex_);
  // Drops the snapshot; its memory is free for the next save.
  void release_snapshot() STRANDLINE_EXCLUDES(mutex_);

  // True the first time: the step that the save has reserved is to be released then.
  [[nodiscard]] bool take_reservation() STRANDLINE_EXCLUDES(mutex_);

  // Whether the error was given to the caller, so that close() need not repeat it.
  void set_raised() STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] bool raised() const STRANDLINE_EXCLUDES(mutex_);

  // ---- The caller's side: see Save ----

  // Fails in a forked child, where nothing else may be called but step().
  [[nodiscard]] Status check_process() const;

  [[nodiscard]] Status wait_staged(std::chrono::milliseconds deadline) STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] Result<Outcome> wait_durable(std::chrono::milliseconds deadline)
      STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] std::optional<Outcome> outcome() const STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] Progress progress() const STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] Timings timings() const STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] std::vector<std::string> warnings() const STRANDLINE_EXCLUDES(mutex_);
  // Returns whether it came in time.
  bool cancel() STRANDLINE_EXCLUDES(mutex_);

 private:
  // Constant after construction.
  const std::int64_t step_;
  const std::shared_ptr<const base::Clock> clock_;
  const base::Clock::Instant called_;
  const std::uint64_t fork_generation_ = base::fork_generation();

  std::atomic<std::uint64_t> bytes_written_{0};

  mutable base::Mutex mutex_;
  base::ConditionVariable changed_;
  std::shared_ptr<staging::Snapshot> snapshot_ STRANDLINE_GUARDED_BY(mutex_);
  Progress progress_ STRANDLINE_GUARDED_BY(mutex_);  // As it was when the snapshot was dropped.
  Timings timings_ STRANDLINE_GUARDED_BY(mutex_);
  std::vector<std::string> warnings_ STRANDLINE_GUARDED_BY(mutex_);
  std::optional<Status> staged_ STRANDLINE_GUARDED_BY(mutex_);
  std::optional<Outcome> outcome_ STRANDLINE_GUARDED_BY(mutex_);
  bool cancel_asked_ STRANDLINE_GUARDED_BY(mutex_) = false;
  bool cancel_closed_ STRANDLINE_GUARDED_BY(mutex_) = false;
  bool reserved_ STRANDLINE_GUARDED_BY(mutex_) = true;
  bool raised_ STRANDLINE_GUARDED_BY(mutex_) = false;
};

}  // namespace strandline::inline v0
