// The only staging path: from views of the training job's memory to a Snapshot.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

#include "base/clock.h"
#include "base/executor.h"
#include "device/registry.h"
#include "memory/slab.h"
#include "staging/plan.h"
#include "staging/snapshot.h"
#include "strandline/error.h"
#include "strandline/state_dict.h"

namespace strandline::staging {

// Where the blocked time of one take() went.
struct TakeTimings {
  double plan_ms = 0;
  double wait_ms = 0;
  double copy_ms = 0;
};

struct TakeOptions {
  Layout layout = Layout::kFile;
  // Until when to wait for memory and for devices.
  base::Clock::Instant deadline;
  // Fail at once with kTimeout where memory is taken by earlier generations.
  bool wait_for_memory = true;
  // Called on the caller's thread when the plan is made and before anything is copied, so that the
  // consumer can work while the rest is staged. REQUIRED for states larger than the ceiling. An
  // error that it returns ends the take.
  std::function<Status(std::shared_ptr<Snapshot>)> started;
};

// Owns the slab and the copy workers. Thread-safety: take() is thread-safe; two of them share the
// memory ceiling.
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
  // `copy`): afterwards the state may change. Every stored byte is digested. On failure the
  // snapshot given to `started` fails with the same error, and memory that a device may still
  // write to is given back only when that device has finished.
  [[nodiscard]] Result<std::shared_ptr<Snapshot>> take(const StateDict& state,
                                                       const TakeOptions& options,
                                                       TakeTimings* timings);

  [[nodiscard]] const memory::Slab& slab() const { return slab_; }

 private:
  memory::Slab slab_;
  const device::Registry& devices_;
  base::Executor* const workers_;
  const base::Clock& clock_;
};

}  // namespace strandline::staging
