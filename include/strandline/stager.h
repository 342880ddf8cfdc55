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
  /// Let copies from devices run beside each other. Needs a device other than the host.
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
  /// Fails at once where nothing can be staged; what goes wrong later fails the future.
  [[nodiscard]] virtual Result<Future<StateDict>> stage(const StateDict& state) = 0;

  /// Waits for stagings still running and ends the stager; results stay valid. Idempotent.
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
  ~StateDictStager();

  /// The staged state. Fails with kMemoryLimit where it does not fit, naming state, ceiling and how
  /// much earlier results that are still held take; with a device's error or kTimeout;
  /// kInvalidArgument or kUnsupported with the key path of a tensor that cannot be staged; and
  /// kUnavailable after close() or in a forked child.
  [[nodiscard]] Result<StateDict> stage(const StateDict& state);

  /// Ends the stager. Results stay valid. Idempotent.
  void close();

  /// Host memory that results hold, and that is kept for the next ones; in bytes.
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
/// `use_async_staging` devices may still copy then, and the future ends when they have.
///
/// Thread-safety: thread-safe.
class STRANDLINE_EXPORT DefaultStager final : public CheckpointStager {
 public:
  /// Fails with kInvalidArgument where `use_non_blocking_copy` finds no device but the host, as
  /// PyTorch's does; else as StateDictStager::open().
  [[nodiscard]] static Result<DefaultStager> open(CheckpointStagerConfig config = {});
  DefaultStager(DefaultStager&&) noexcept;
  DefaultStager& operator=(DefaultStager&&) noexcept;
  ~DefaultStager() override;

  [[nodiscard]] Result<Future<StateDict>> stage(const StateDict& state) override;
  [[nodiscard]] Status close() override;

 private:
  friend class StagerAccess;  // For tests: other devices.
  DefaultStager(CheckpointStagerConfig config, StateDictStager stager);

  CheckpointStagerConfig config_;
  StateDictStager stager_;
};

}  // namespace strandline::inline v0
