// The copying of some segments of a snapshot, shared by all threads that help.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/mutex.h"
#include "base/wait.h"
#include "device/registry.h"
#include "format/digest.h"
#include "memory/slab.h"
#include "staging/snapshot.h"
#include "strandline/error.h"
#include "strandline/state_dict.h"

namespace strandline::staging {

// A thread claims tasks of about this many bytes: large enough that claiming costs nothing, small
// enough that the threads end together.
inline constexpr std::uint64_t kCopyTaskBytes = 2ull << 20;

// And of at most this many pieces, where tensors are small.
inline constexpr std::size_t kCopyTaskPieces = 64;

// What the copying fails with when a device takes too long.
inline constexpr const char* kDeviceTooSlow =
    "a device did not finish copying before the deadline: raise memory_wait (of a stager: "
    "device_wait), or check the device";

// A chunk's digest that began in one segment and goes on in the next.
using OpenDigest = std::optional<format::DigestStream>;

// Thread-safety: thread-safe. Life cycle: the caller of Snapshotter::take() makes a job, posts
// help() to the workers, helps itself, and waits until all has arrived, or leaves while devices
// still copy. It lives until the caller has left, no worker helps and no device owes a completion
// any more. It holds the leases until nothing will be copied to them any more, at the latest when
// that is so; and each completion holds the tensor's keep-alive.
class CopyJob : public std::enable_shared_from_this<CopyJob> {
 public:
  struct Target {
    std::size_t segment = 0;  // Index in Snapshot::segments().
    memory::Lease lease;
  };

  // What is copied from. Views and devices are only looked at while a task runs: never after wait()
  // or leave() has returned.
  struct Source {
    // By index: the tensors of the state (kFile), or the extents (kStorage).
    std::span<const TensorView> views;
    const device::Registry* devices = nullptr;
    std::shared_ptr<const Structure> structure;  // Names the tensors in errors.
  };

  // Copies the header parts; segments that need nothing else are filled at once. `open` comes from
  // the job of the segment before.
  CopyJob(std::shared_ptr<Snapshot> snapshot, std::vector<Target> targets, Source source,
          OpenDigest open);

  [[nodiscard]] std::size_t task_count() const { return task_ends_.size(); }

  // Runs tasks until none is left to claim or the job has failed.
  void help() STRANDLINE_EXCLUDES(mutex_);

  // Waits for the tasks that run (as long as they take to copy their bytes: their memory is the
  // caller's) and, as long as `patience` has it, for devices. Fails with the first error, with
  // kTimeout, or with kUnavailable once interrupted; then no task is begun any more and late
  // completions change nothing. REQUIRES: help() has returned on this thread.
  [[nodiscard]] Status wait(base::Wait& patience) STRANDLINE_EXCLUDES(mutex_);

  // The same without waiting for devices: when it returns, everything of the host has been copied
  // and all other copies have been started. From then on an error ends the snapshot too.
  void leave() STRANDLINE_EXCLUDES(mutex_);

  // The digest that is left open at the end. REQUIRES: wait() has succeeded.
  [[nodiscard]] OpenDigest take_open() { return std::move(open_out_); }

 private:
  // A part of a stored tensor's row-major bytes that lies in one digest chunk and one segment.
  struct Piece {
    std::uint32_t target = 0;  // Index in targets_.
    std::uint32_t file = 0;
    std::uint32_t index = 0;  // In FilePlan::tensors.
    std::uint64_t begin = 0;
    std::uint64_t bytes = 0;
  };

  void copy_header(const Target& target) const;
  void cut_pieces(std::uint32_t target);
  void cut_tasks();
  [[nodiscard]] std::span<std::byte> memory_of(const Piece& piece) const;
  [[nodiscard]] const PlacedTensor& placed(const Piece& piece) const;
  [[nodiscard]] const TensorView& source_of(const Piece& piece) const;
  void start(std::size_t piece);
  void done(std::size_t piece, Status status) STRANDLINE_EXCLUDES(mutex_);
  void digest(const Piece& piece);
  void fail(Error error) STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] Status wait_for_targets(base::Wait& patience) STRANDLINE_EXCLUDES(mutex_);
  void end_use();
  [[nodiscard]] Error with_name(const Piece& piece, Error error) const;

  // Constant after construction.
  const std::shared_ptr<Snapshot> snapshot_;
  const Source source_;
  std::vector<Piece> pieces_;
  std::vector<std::size_t> task_ends_;  // One past the last piece of each task.

  // Their leases are dropped by whoever ends the last use of them: the caller's until it leaves, or
  // a piece's from its start to its completion.
  std::vector<Target> targets_;
  std::atomic<std::size_t> uses_{1};

  // Each is touched by the one piece that goes on with it, or leaves it open.
  OpenDigest open_in_;
  OpenDigest open_out_;

  std::vector<std::atomic<std::size_t>> pieces_left_;  // Of each target.
  std::atomic<bool> failed_{false};                    // Set with error_, read without the lock.

  base::Mutex mutex_;
  base::ConditionVariable changed_;
  std::size_t next_task_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  std::size_t running_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  std::size_t targets_left_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  std::optional<Error> error_ STRANDLINE_GUARDED_BY(mutex_);
  bool left_ STRANDLINE_GUARDED_BY(mutex_) = false;
};

}  // namespace strandline::staging
