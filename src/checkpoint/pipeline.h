// What happens to a save in the background: write, commit, one outcome. One after the other.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "base/wait.h"
#include "checkpoint/committer.h"
#include "checkpoint/environment.h"
#include "checkpoint/save_record.h"
#include "staging/snapshot.h"
#include "strandline/checkpointer.h"

namespace strandline::checkpoint {

// Saves that may be in flight at once. Each holds a generation of staging memory, so that more
// would only wait for memory; two already keep disk and trainer both busy.
inline constexpr std::uint32_t kSavesInFlightMax = 4;

// Failures in a row after which save() fails once, so that they cannot go unseen. One that the
// caller was given already, by wait_durable(), was seen and does not count.
inline constexpr std::uint32_t kFailuresInRowMax = 3;

// Thread-safety: thread-safe. The caller of save() admits and submits; the executor's one thread
// runs; anybody waits.
class Pipeline {
 public:
  // All must outlive the pipeline, or, like the executor, drain before they go.
  Pipeline(Committer& committer, std::shared_ptr<base::Executor> executor,
           std::shared_ptr<const base::Clock> clock, std::chrono::milliseconds segment_wait);

  // Reserves one of the kSavesInFlightMax places. Fails with kTimeout at the deadline, and with
  // kUnavailable once interrupted. Blocks.
  [[nodiscard]] Status admit(base::Wait& wait) STRANDLINE_EXCLUDES(mutex_);
  // Gives a place back that was not used for submit().
  void dismiss() STRANDLINE_EXCLUDES(mutex_);

  struct Job {
    std::shared_ptr<Save::Record> record;
    std::shared_ptr<staging::Snapshot> snapshot;
    StateDict tree;  // Without views into the caller's memory.
    SaveOptions options;
  };
  // Queues an admitted save. Its record ends exactly once.
  void submit(Job job) STRANDLINE_EXCLUDES(mutex_);
  // Ends a save that found no room, as one that failed in the background.
  void end_failed(const std::shared_ptr<Save::Record>& record, Error error)
      STRANDLINE_EXCLUDES(mutex_);

  [[nodiscard]] Status wait_until_idle(base::Clock::Instant deadline) STRANDLINE_EXCLUDES(mutex_);
  // Cancels every save, and gives the directory up when the last of them has ended.
  void give_up() STRANDLINE_EXCLUDES(mutex_);

  // Decides what save() does about earlier failures: an error to fail with (which then counts as
  // raised), or warnings to go on with.
  [[nodiscard]] Result<std::vector<std::string>> review_failures(ErrorPolicy policy)
      STRANDLINE_EXCLUDES(mutex_);
  // The errors that nobody has been given yet; with `raise` they count as given.
  [[nodiscard]] std::vector<Error> failures(bool raise) STRANDLINE_EXCLUDES(mutex_);

 private:
  struct Failed {
    std::shared_ptr<Save::Record> record;
    bool warned = false;  // By a later save().
    bool in_row = true;   // Nothing was committed since.
  };

  void run(Job& job) STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] Status write_and_commit(Job& job);
  void end(const std::shared_ptr<Save::Record>& record, Outcome outcome)
      STRANDLINE_REQUIRES(mutex_);

  // Constant after construction.
  Committer& committer_;
  const std::shared_ptr<base::Executor> executor_;
  const std::shared_ptr<const base::Clock> clock_;
  const std::chrono::milliseconds segment_wait_;

  mutable base::Mutex mutex_;
  base::ConditionVariable changed_;
  std::uint32_t in_flight_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  bool given_up_ STRANDLINE_GUARDED_BY(mutex_) = false;
  std::vector<std::shared_ptr<Save::Record>> running_ STRANDLINE_GUARDED_BY(mutex_);
  std::vector<Failed> failed_ STRANDLINE_GUARDED_BY(mutex_);
};

}  // namespace strandline::checkpoint
