// What the engine is given instead of making it: time, threads, devices. Tests give their own.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "base/clock.h"
#include "base/executor.h"
#include "device/registry.h"
#include "strandline/checkpointer.h"

namespace strandline::checkpoint {

struct Environment {
  std::shared_ptr<const base::Clock> clock;
  std::shared_ptr<const device::Registry> devices;
  std::shared_ptr<base::Executor> pipeline;      // Runs one task at a time, in order.
  std::shared_ptr<base::Executor> copy_workers;  // May be null: then the caller copies alone.
};

// The real clock, the host device, one pipeline thread, `copy_threads` workers. Fails with
// kUnavailable where the system gives no more threads.
[[nodiscard]] Result<Environment> make_environment(std::optional<std::uint32_t> copy_threads);

// 128 random bits in hex.
[[nodiscard]] Result<std::string> make_run_id();

}  // namespace strandline::checkpoint

namespace strandline::inline v0 {

// Opens a Checkpointer with injected parts.
struct CheckpointerAccess {
  [[nodiscard]] static Result<Checkpointer> open(std::shared_ptr<Storage> storage,
                                                 CheckpointerOptions options,
                                                 checkpoint::Environment environment);
};

}  // namespace strandline::inline v0
