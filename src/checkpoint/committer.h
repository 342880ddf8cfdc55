// The only code that knows the order of a commit, what may be replaced, and what may be deleted.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/mutex.h"
#include "checkpoint/catalog.h"
#include "staging/snapshot.h"
#include "strandline/checkpointer.h"
#include "strandline/storage.h"

namespace strandline::checkpoint {

// Everything that a step's files are made from, besides the shards themselves.
struct CommitRequest {
  std::int64_t step = 0;
  const StateDict* tree = nullptr;  // Structure and plain values; the views are not read.
  const staging::Snapshot* snapshot = nullptr;
  const SaveOptions* options = nullptr;
  std::vector<FileInfo> shards;  // As the ShardWriter left them: synced.
  // Asked once, right before publishing; an error calls the commit off.
  std::function<Status()> last_chance;
};

// What a commit of its own looks like on the storage.
struct CommitTarget {
  std::string name;  // Of the step's directory.
  std::uint64_t sequence = 1;
  std::optional<std::uint64_t> parent;
  Publish mode = Publish::kNew;
};

// Writes rank file, indexes, extra files and manifest beside the shards, reads everything but the
// data back (the data too if `verify_data`), and publishes. The order is what makes a commit safe:
// docs/guarantees.md. Returns what publish() returned. Blocks.
[[nodiscard]] Result<Publication> write_and_publish(Storage& storage, const CommitTarget& target,
                                                    const std::string& run, bool verify_data,
                                                    const base::Clock& clock,
                                                    const CommitRequest& request,
                                                    std::unique_ptr<PartialDirectory> partial);

// Commits the steps of one Checkpointer. Thread-safety: thread-safe; prepare() is called by save(),
// the others by the pipeline.
class Committer {
 public:
  Committer(std::shared_ptr<Storage> storage, CheckpointerOptions options, std::string run,
            const base::Clock& clock);

  // Becomes the writer (the first time: takes the lock, sweeps what dead runs left behind) and
  // decides whether `step` may be saved now. Reserves it until release(). Returns what the caller
  // should be warned of. Blocks: the first time for a reading of every manifest, and where the step
  // exists already on this job's branch for a reading of all its data. During the latter
  // `interrupted` (may be null) is asked; true ends it with kUnavailable.
  [[nodiscard]] Result<std::vector<std::string>> prepare(std::int64_t step, bool overwrite,
                                                         const std::function<bool()>& interrupted)
      STRANDLINE_EXCLUDES(mutex_);

  // Starts the step's partial directory.
  [[nodiscard]] Result<std::unique_ptr<PartialDirectory>> begin(std::int64_t step);

  // Commits a prepared step and prunes older ones. On success it is durable and verified. Returns
  // warnings (of pruning). Blocks.
  [[nodiscard]] Result<std::vector<std::string>> commit(const CommitRequest& request,
                                                        std::unique_ptr<PartialDirectory> partial)
      STRANDLINE_EXCLUDES(mutex_);

  // Ends the reservation of a step.
  void release(std::int64_t step) STRANDLINE_EXCLUDES(mutex_);

  // What the job descends from, from now on.
  void note_restored(std::uint64_t sequence) STRANDLINE_EXCLUDES(mutex_);

  // Gives the directory up; the next prepare() takes it again.
  void unlock() STRANDLINE_EXCLUDES(mutex_);

 private:
  [[nodiscard]] Status become_writer() STRANDLINE_REQUIRES(mutex_);
  [[nodiscard]] Result<std::vector<std::string>> check_existing(
      std::int64_t step, bool overwrite, const std::function<bool()>& interrupted)
      STRANDLINE_REQUIRES(mutex_);
  [[nodiscard]] std::vector<std::string> prune();

  // Constant after construction.
  const std::shared_ptr<Storage> storage_;
  const CheckpointerOptions options_;
  const std::string run_;
  const base::Clock& clock_;

  base::Mutex mutex_;
  std::unique_ptr<WriterLock> lock_ STRANDLINE_GUARDED_BY(mutex_);
  std::uint64_t highest_sequence_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  std::optional<std::uint64_t> parent_ STRANDLINE_GUARDED_BY(mutex_);
  std::multiset<std::int64_t> reserved_ STRANDLINE_GUARDED_BY(mutex_);
};

}  // namespace strandline::checkpoint
