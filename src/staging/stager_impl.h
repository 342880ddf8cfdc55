// What the stagers are made of.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "base/clock.h"
#include "base/executor.h"
#include "base/fork.h"
#include "base/mutex.h"
#include "device/registry.h"
#include "staging/activity.h"
#include "staging/snapshotter.h"
#include "strandline/future.h"
#include "strandline/stager.h"

namespace strandline::staging {

// What a stager is given instead of making it: time, threads, devices. Tests give their own.
struct StagerParts {
  std::shared_ptr<const base::Clock> clock;
  std::shared_ptr<const device::Registry> devices;
  std::shared_ptr<base::Executor> workers;  // May be null: then callers copy alone.
  // Ends stagings whose devices take too long, one task for each, in order. Null where devices are
  // always waited for.
  std::shared_ptr<base::Executor> watcher;
};

// The real clock, the devices of this build, `copy_threads` workers, and a watcher if `outstanding`
// copies are allowed and there is a device to be outstanding. Fails with kInvalidArgument for
// absurdly many threads, and with kUnavailable where the system gives no more.
[[nodiscard]] Result<StagerParts> make_stager_parts(std::optional<std::uint32_t> copy_threads,
                                                    bool outstanding);

}  // namespace strandline::staging

namespace strandline::inline v0 {

// Thread-safety: thread-safe.
struct StateDictStager::Impl {
  Impl(const Options& given, staging::StagerParts parts);

  [[nodiscard]] bool forked() const { return base::fork_generation() != fork_generation; }

  // Blocks until everything is copied.
  [[nodiscard]] Result<StateDict> stage(const StateDict& state);
  // Leaves copies of devices outstanding, which the future ends with.
  [[nodiscard]] Result<Future<StateDict>> stage_async(const StateDict& state);

  // Waits for stagings and ends the threads. Fails with kTimeout.
  [[nodiscard]] Status close() STRANDLINE_EXCLUDES(mutex);

  // One more staging, for as long as it runs. Fails in a forked child and after close().
  [[nodiscard]] Result<std::shared_ptr<const void>> begin() const;
  // A snapshot, and the state in its memory, which alone holds that memory; none if the snapshot
  // has failed already.
  struct Taken {
    std::shared_ptr<staging::Snapshot> snapshot;
    std::optional<StateDict> staged;
  };
  [[nodiscard]] Result<Taken> take(const StateDict& state, bool wait_for_devices);

  // Constant after construction.
  const Options options;
  const std::uint64_t fork_generation = base::fork_generation();
  const std::shared_ptr<staging::Activity> activity = std::make_shared<staging::Activity>();

  // Its threads are ended by close(), when no staging can need them any more.
  base::Mutex mutex;
  staging::StagerParts parts;
  staging::Snapshotter snapshotter;
};

// Opens stagers with injected parts.
class StagerAccess {
 public:
  [[nodiscard]] static Result<StateDictStager> open(StateDictStager::Options options,
                                                    staging::StagerParts parts);
  [[nodiscard]] static Result<DefaultStager> open(CheckpointStagerConfig config,
                                                  staging::StagerParts parts);
};

}  // namespace strandline::inline v0
