/// @file
/// The handle of one save: its progress, its timings and its single outcome.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "strandline/error.h"
#include "strandline/export.h"

namespace strandline::inline v0 {

/// How a save ended; every save ends in exactly one of these.
struct Outcome {
  enum class Kind : std::uint8_t {
    kCommitted,  ///< Durable and verified.
    kFailed,     ///< `cause` says why; what was committed before is untouched.
    kSkipped,    ///< Deliberately not written (cancelled, or no memory with MemoryPolicy::kSkip).
  };
  Kind kind = Kind::kCommitted;
  std::optional<Error> cause;  ///< Set unless committed.
};

/// How far a save has come. Bytes count the data of tensors, each stored tensor once.
struct Progress {
  std::uint64_t bytes_total = 0;
  std::uint64_t bytes_staged = 0;   ///< Copied out of the training job's memory.
  std::uint64_t bytes_written = 0;  ///< Handed to the storage.
  bool ended = false;               ///< There is an outcome.
};

/// Where the time of a save went, in milliseconds. `blocked_ms` is what the caller waited for.
struct Timings {
  double collect_ms = 0;  ///< Walking the state (adapters report it).
  double prepare_ms = 0;  ///< Waiting for another thread's save(), looking at the directory.
  double plan_ms = 0;     ///< Laying out files.
  double wait_ms = 0;     ///< Waiting for staging memory.
  double copy_ms = 0;     ///< Copying and digesting.
  double write_ms = 0;    ///< Writing the staged bytes, in the background.
  double commit_ms = 0;   ///< Manifest, syncs, publishing, verifying.
  double blocked_ms = 0;  ///< From the call to its return.
  double durable_ms = 0;  ///< From the call to `committed`; 0 until then.
};

/// One save. Copies are handles of the same save.
///
/// Thread-safety: thread-safe. The handle outlives its Checkpointer.
class STRANDLINE_EXPORT Save {
 public:
  /// The step that is saved.
  [[nodiscard]] std::int64_t step() const;

  /// Waits until the state may be mutated again. In mode `copy` that is so when save() returns.
  /// Fails with kTimeout at the deadline, or with what made staging fail.
  [[nodiscard]] Status wait_staged(std::chrono::milliseconds deadline) const;

  /// Waits for the outcome: committed or skipped. Fails with the save's error if it failed, or with
  /// kTimeout at the deadline (the save goes on).
  [[nodiscard]] Result<Outcome> wait_durable(std::chrono::milliseconds deadline) const;

  /// The outcome, or nothing while the save runs.
  [[nodiscard]] std::optional<Outcome> outcome() const;

  /// How far it has come, and where its time went so far. Neither blocks.
  [[nodiscard]] Progress progress() const;
  [[nodiscard]] Timings timings() const;

  /// What the caller should know although the save went on: streamed in waves, replaced a step of
  /// an abandoned branch, an earlier save failed, …
  [[nodiscard]] std::vector<std::string> warnings() const;

  /// Asks for the save to be given up. Before it is published the outcome becomes
  /// skipped(cancelled); afterwards nothing changes. Returns at once; wait_durable() tells.
  void cancel() const;

  /// One line: "step 1200: blocked 41 ms (collect 6, plan 3, copy 32), durable in 0.9 s, …";
  /// with the times to prepare and to wait where they count.
  [[nodiscard]] std::string summary() const;

  /// The engine's own record; used by the engine only.
  class Record;
  explicit Save(std::shared_ptr<Record> record) : record_(std::move(record)) {}

 private:
  std::shared_ptr<Record> record_;
};

}  // namespace strandline::inline v0
