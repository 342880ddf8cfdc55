// The only staging path: from views of the training job's memory to a Snapshot.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "base/clock.h"
#include "base/executor.h"
#include "base/turn.h"
#include "base/wait.h"
#include "device/registry.h"
#include "memory/slab.h"
#include "staging/copy_job.h"
#include "staging/plan.h"
#include "staging/snapshot.h"
#include "strandline/error.h"
#include "strandline/state_dict.h"

namespace strandline::staging {

// Where the blocked time of one take() went, and who made it fail.
struct TakeTimings {
  double plan_ms = 0;
  double wait_ms = 0;
  double copy_ms = 0;
  // Nothing is wrong with the state or its devices: the consumer abandoned the snapshot, or memory
  // that consumers hold did not come back in time.
  bool failed_by_consumer = false;
};

struct TakeOptions {
  Layout layout = Layout::kFile;
  // Until when to wait for other snapshots: for their turn to end, and for memory they hold.
  base::Clock::Instant deadline;
  // How long to wait for the devices of a wave (a snapshot that fits at once is one wave), and for
  // the memory that this snapshot's own consumer gives back. Each wave has it anew, so that a large
  // state on a slow disk may take as long as it keeps going on.
  std::chrono::milliseconds wave_wait{std::chrono::minutes(10)};
  // Asked while it waits for these; true ends the take with kUnavailable. See base::Wait.
  std::function<bool()> interrupted;
  // Fail at once where memory is taken by earlier generations: with kTimeout, and with kStorage,
  // which never waits for it, with kMemoryLimit (who holds a result may hold it for ever).
  bool wait_for_memory = true;
  // Or return as soon as everything of the host has been copied and the rest is on its way. The
  // snapshot then ends later, with the error where a device fails; whoever holds it says by
  // Snapshot::fail() when that takes too long. REQUIRES without it: layout kStorage.
  bool wait_for_devices = true;
  // Called on the caller's thread when there is memory and before anything is copied, so that the
  // consumer can work while the rest is staged. REQUIRED for states larger than the ceiling, whose
  // later waves wait for the consumer to release earlier ones. An error that it returns ends the
  // take. Calls come in the order in which snapshots got their memory, one at a time: a consumer
  // that works in this order never makes two snapshots wait for each other.
  std::function<Status(std::shared_ptr<Snapshot>)> started;
};

// Below this ceiling a state that does not fit at once is refused: waves of a few pages would cost
// more in waiting than they save, and one digest chunk would lie in more than two of them.
inline constexpr std::uint64_t kWavesHostBytesMin = 1ull << 20;

// Owns the slab. Thread-safety: take() is thread-safe; several of them share the memory ceiling,
// and copy at the same time unless one of them streams in waves: it has the slab for itself.
class Snapshotter {
 public:
  struct Options {
    memory::Slab::Options slab;
  };

  // `workers` helps the caller copy and may be null. It, `devices` and `clock` must outlive the
  // Snapshotter.
  Snapshotter(Options options, const device::Registry& devices, base::Executor* workers,
              const base::Clock& clock);

  // Copies everything that `state` reaches and returns when all of it has been copied (mode
  // `copy`): afterwards the state may change. With kFile every stored byte is digested, and a state
  // larger than the ceiling streams in waves of half of it; with kStorage it fails. Blocks until
  // then, at the longest until the deadline plus twice wave_wait for each wave. `timings` may be
  // null.
  //
  // On failure the snapshot given to `started` fails with the same error, and memory that a device
  // may still write to is given back only when that device has finished; the tensors' keep-alives
  // are held as long. Fails with what the layout's plan fails with; kUnsupported for a device that
  // is not registered; kTimeout where memory or a device keeps it waiting; kUnavailable where it
  // was interrupted meanwhile; kMemoryLimit where the ceiling, the host or its cgroup do not allow
  // it; with a device's error; or with what the consumer abandoned the snapshot with.
  [[nodiscard]] Result<std::shared_ptr<Snapshot>> take(const StateDict& state,
                                                       const TakeOptions& options,
                                                       TakeTimings* timings);

  [[nodiscard]] const memory::Slab& slab() const { return slab_; }

  // The last snapshot was taken: memory goes back to the system as soon as nobody holds it.
  void retire() { slab_.retire(); }

 private:
  [[nodiscard]] Result<StoragePlan> make_plan(const StateDict& state, Layout layout) const;
  [[nodiscard]] Result<std::shared_ptr<Snapshot>> lay_snapshot(std::shared_ptr<const Plan> plan,
                                                               const TakeOptions& options);
  [[nodiscard]] Status stage(const std::shared_ptr<Snapshot>& snapshot,
                             const CopyJob::Source& source, const TakeOptions& options,
                             base::Turn& turn, base::Wait& wait, TakeTimings& timings);
  [[nodiscard]] Result<std::vector<CopyJob::Target>> lease(Snapshot& snapshot, std::size_t first,
                                                           std::size_t last,
                                                           const TakeOptions& options,
                                                           base::Wait& wait, TakeTimings& timings);
  [[nodiscard]] Error beside_results(std::uint64_t needed) const;
  void copy(const std::shared_ptr<CopyJob>& job);

  memory::Slab slab_;
  const device::Registry& devices_;
  base::Executor* const workers_;
  const base::Clock& clock_;

  // The right to lease: held for the first lease and `started`, or for all waves.
  base::Turns turns_;
};

}  // namespace strandline::staging
