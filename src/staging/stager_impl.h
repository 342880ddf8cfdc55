// What the stagers are made of.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "base/clock.h"
#include "base/executor.h"
#include "base/fork.h"
#include "device/registry.h"
#include "memory/slab.h"
#include "staging/snapshotter.h"
#include "strandline/stager.h"

namespace strandline::staging {

// What a stager is given instead of making it: time, threads, devices. Tests give their own.
struct StagerParts {
  std::shared_ptr<const base::Clock> clock;
  std::shared_ptr<const device::Registry> devices;
  std::shared_ptr<base::Executor> workers;  // May be null: then callers copy alone.
};

// The real clock, the devices of this build, `copy_threads` workers. Fails with kInvalidArgument
// for absurdly many of them, and with kUnavailable where the system gives no more threads.
[[nodiscard]] Result<StagerParts> make_stager_parts(std::optional<std::uint32_t> copy_threads);

}  // namespace strandline::staging

namespace strandline::inline v0 {

// Thread-safety: thread-safe.
struct StateDictStager::Impl {
  Impl(Options given, staging::StagerParts stager_parts);

  // Fails in a forked child and after close().
  [[nodiscard]] Status check_usable() const;

  // The staged state; blocks until everything is copied.
  [[nodiscard]] Result<StateDict> stage(const StateDict& state);

  // Constant after construction.
  const Options options;
  const staging::StagerParts parts;
  const std::uint64_t fork_generation = base::fork_generation();

  staging::Snapshotter snapshotter;
  std::atomic<bool> closed{false};
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
