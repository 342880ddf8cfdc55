/// @file
/// Staging without saving: a copy of a state in host memory that training no longer touches.
///
/// The same names as PyTorch's (`torch.distributed.checkpoint._experimental.staging`, and
/// `_state_dict_stager`), over the one engine that the Checkpointer stages with. They differ where
/// the original loses data: a result is never overwritten while anyone holds it or a tensor of it,
/// only reachable bytes are copied, and a future ends when the last byte has arrived.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>

#include "strandline/error.h"
#include "strandline/export.h"
#include "strandline/future.h"
#include "strandline/state_dict.h"

namespace strandline::inline v0 {

/// How a DefaultStager stages.
struct CheckpointStagerConfig {
  /// Stage into memory that devices copy to faster. Without effect where there is no device.
  bool use_pinned_memory = true;
  /// Stage into memory that other processes can map (see share() in shared_memory.h).
  bool use_shared_memory = true;
  /// Return before devices have finished copying; host tensors are always copied on return.
  bool use_async_staging = true;
  /// Demand a device other than the host, as PyTorch's does. Has no other effect: copies from
  /// devices never block the thread that starts them.
  bool use_non_blocking_copy = true;

  /// The ceiling of staged bytes. Default: half of what the host and its memory cgroup have free.
  std::optional<std::uint64_t> host_bytes_max = {};
  /// Threads that help the caller copy. Default: half the cores, between 1 and 8; at most 256.
  std::optional<std::uint32_t> copy_threads = {};
  /// How long devices may take to finish copying; then the staging fails with kTimeout.
  std::chrono::milliseconds device_wait{std::chrono::minutes(10)};
};

/// The interface of whatever stages. Thread-safety: as the implementation says.
class STRANDLINE_EXPORT CheckpointStager {
 public:
  virtual ~CheckpointStager() = default;

  /// Stages a state: the result has the same structure, its tensors the same shapes, strides,
  /// types and aliases, in memory of its own that lives as long as the result or any view of it.
  /// Fails at once where nothing can be staged; what goes wrong later fails the future, and never
  /// the next staging.
  [[nodiscard]] virtual Result<Future<StateDict>> stage(const StateDict& state) = 0;

  /// Waits for stagings still running, whose futures end with what they come to, and ends the
  /// stager; results stay valid. Fails with kTimeout where one does not end. Idempotent. Not to be
  /// called from what Future::then() calls back.
  [[nodiscard]] virtual Status close() = 0;
};

/// The copy itself, always finished on return.
///
/// Aliases and views stay so: one extent per source storage, strides kept; if the tensors reach
/// only a part of it, that part is copied and offsets count from its beginning.
///
/// Thread-safety: thread-safe. Blocking: stage() blocks until everything is copied.
class STRANDLINE_EXPORT StateDictStager {
 public:
  struct Options {
    bool pin_memory = false;    ///< See CheckpointStagerConfig::use_pinned_memory.
    bool share_memory = false;  ///< See CheckpointStagerConfig::use_shared_memory.
    std::optional<std::uint64_t> host_bytes_max = {};                 ///< As there.
    std::optional<std::uint32_t> copy_threads = {};                   ///< As there.
    std::chrono::milliseconds device_wait{std::chrono::minutes(10)};  ///< As there.
  };

  /// Fails with kInvalidArgument on options that cannot be, kUnavailable where threads cannot
  /// start.
  [[nodiscard]] static Result<StateDictStager> open(Options options);
  StateDictStager(StateDictStager&&) noexcept;
  StateDictStager& operator=(StateDictStager&&) noexcept;
  /// Closes; in a forked child it does nothing.
  ~StateDictStager();

  /// The staged state. Its tensors are the host's and writable, whatever the source's were, with
  /// the same strides and conjugate and negative bits; each view keeps all of the result's memory
  /// alive. Fails with kMemoryLimit where it does not fit, naming state, ceiling and how
  /// much earlier results that are still held take; with a device's error or kTimeout;
  /// kInvalidArgument or kUnsupported with the key path of a tensor that cannot be staged; and
  /// kUnavailable after close() or in a forked child.
  [[nodiscard]] Result<StateDict> stage(const StateDict& state);

  /// Ends the stager, after waiting for calls of other threads. Results stay valid; memory that
  /// no result holds goes back to the system. Idempotent.
  void close();

  /// Host memory that results hold, and that is kept for the next ones; in bytes. Memory that a
  /// device may still write to counts as held. In a forked child 0.
  [[nodiscard]] std::uint64_t host_bytes_in_use() const;
  [[nodiscard]] std::uint64_t host_bytes_mapped() const;

 private:
  friend class DefaultStager;
  friend class StagerAccess;  // For tests: other devices.
  struct Impl;
  explicit StateDictStager(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

/// The stager that most use. Host tensors are copied when stage() returns; with
/// `use_async_staging` devices may still copy then, and the future ends when they have, or after
/// `device_wait`. A device's error fails the future even if it comes before stage() returns.
///
/// Thread-safety: thread-safe. Blocking: stage() blocks for copies of the host's tensors, without
/// `use_async_staging` also for devices, at most `device_wait`. Memory that a device may still
/// write to when its staging has failed stays held, and so do the tensors, until the device has
/// finished.
class STRANDLINE_EXPORT DefaultStager final : public CheckpointStager {
 public:
  /// Fails with kInvalidArgument where `use_non_blocking_copy` finds no device but the host, as
  /// PyTorch's does; else as StateDictStager::open().
  [[nodiscard]] static Result<DefaultStager> open(CheckpointStagerConfig config = {});
  DefaultStager(DefaultStager&&) noexcept;
  DefaultStager& operator=(DefaultStager&&) noexcept;
  /// Closes, so it may wait; in a forked child it does nothing.
  ~DefaultStager() override;

  /// See CheckpointStager. Fails as StateDictStager::stage().
  [[nodiscard]] Result<Future<StateDict>> stage(const StateDict& state) override;
  /// See CheckpointStager. In a forked child it does nothing.
  [[nodiscard]] Status close() override;

 private:
  friend class StagerAccess;  // For tests: other devices.
  DefaultStager(CheckpointStagerConfig config, StateDictStager stager);

  CheckpointStagerConfig config_;
  StateDictStager stager_;
};

}  // namespace strandline::inline v0
