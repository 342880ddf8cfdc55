// One generation of staged bytes, on its way from the training job to the disk.
//
// A snapshot's files are cut into segments: one per file when all of them fit under the memory
// ceiling at once, else waves. The Snapshotter fills segments in order; the ShardWriter takes them
// in the same order, writes them, and gives their memory back. A snapshot that was filled whole
// stays valid as long as anyone holds it, whatever is staged next. In waves the Snapshotter needs
// the memory of earlier segments for later ones: a consumer that stops must say so by abandon().
// A stager's snapshot (kStorage) has one segment and no consumer: its memory passes to the result.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/clock.h"
#include "base/mutex.h"
#include "format/digest.h"
#include "memory/slab.h"
#include "staging/plan.h"
#include "strandline/error.h"
#include "strandline/state_dict.h"

namespace strandline::staging {

// A range of one file's bytes.
struct Segment {
  std::uint32_t file = 0;         // Index in Plan::files.
  std::uint64_t file_offset = 0;  // A multiple of 4096.
  std::uint64_t bytes = 0;
};

// Thread-safety: thread-safe. One producer (Snapshotter) and one consumer (ShardWriter).
class Snapshot {
 public:
  Snapshot(std::shared_ptr<const Plan> plan, std::vector<Segment> segments, bool in_waves);

  [[nodiscard]] const Plan& plan() const { return *plan_; }
  // In the order of the files, and of the bytes in each.
  [[nodiscard]] const std::vector<Segment>& segments() const { return segments_; }
  // Whether the state did not fit under the memory ceiling at once.
  [[nodiscard]] bool in_waves() const { return in_waves_; }

  // ---- Consumer ----

  // The memory of a segment, as far as it has been leased and not been given back; it may still be
  // filled.
  [[nodiscard]] memory::Lease lease(std::size_t index) const STRANDLINE_EXCLUDES(mutex_);
  // Waits until segment `index` is filled. Fails with what staging failed with (filled segments
  // included), or kTimeout. The bytes stay valid until the segment is released, the consumer
  // abandons the snapshot, or the snapshot ends.
  [[nodiscard]] Result<std::span<const std::byte>> wait_segment(std::size_t index,
                                                                base::Clock::Instant deadline)
      STRANDLINE_EXCLUDES(mutex_);
  // Gives the memory of a segment back (unless others hold its lease). A segment that is not filled
  // yet is given back when it is.
  void release_segment(std::size_t index) STRANDLINE_EXCLUDES(mutex_);
  // The consumer will read no further: the snapshot fails with `error`, all memory is given back
  // (once devices no longer write to it), and a take() that still fills it ends with that error.
  void abandon(Error error) STRANDLINE_EXCLUDES(mutex_);

  // The digests of a stored tensor's bytes, one per chunk, once its last segment is filled.
  // REQUIRES: layout kFile. The others have none: nothing of them is read back later.
  [[nodiscard]] const std::vector<format::Digest>& digests(std::uint32_t file,
                                                           std::uint32_t index) const;

  [[nodiscard]] std::uint64_t bytes_staged() const { return bytes_staged_.load(); }

  // Calls `ended` once when the snapshot has been filled whole (success) or has failed: at once and
  // on this thread if it has, otherwise on the thread that ends it, without any lock. The memory of
  // released segments, and of those that a failure leaves unfilled, has been given back by then.
  // REQUIRES: called at most once.
  void when_ended(std::function<void(const Status&)> ended) STRANDLINE_EXCLUDES(mutex_);
  // Waits until it has been filled whole or has failed; false at the deadline.
  [[nodiscard]] bool wait_ended(base::Clock::Instant deadline) STRANDLINE_EXCLUDES(mutex_);

  // ---- Producer ----

  // Gives a segment its memory; ignored once the snapshot has failed.
  void set_lease(std::size_t index, memory::Lease lease) STRANDLINE_EXCLUDES(mutex_);
  // Marks a segment as filled; ignored once the snapshot has failed.
  void set_filled(std::size_t index) STRANDLINE_EXCLUDES(mutex_);
  void add_bytes_staged(std::uint64_t bytes) { bytes_staged_.fetch_add(bytes); }
  // Each chunk's digest is set by one thread, before set_filled() of the segment it ends in.
  void set_digest(std::uint32_t file, std::uint32_t index, std::uint64_t chunk,
                  format::Digest digest);
  // Ends the snapshot with an error; only the first counts. Waiters are woken. The memory of
  // segments that are not filled is given back; the consumer may still be reading the others.
  void fail(Error error) STRANDLINE_EXCLUDES(mutex_);
  // What the snapshot failed with; success while it has not.
  [[nodiscard]] Status status() const STRANDLINE_EXCLUDES(mutex_);

 private:
  [[nodiscard]] bool ended() const STRANDLINE_REQUIRES(mutex_) {
    return error_ || segments_filled_ == segments_.size();
  }

  // Constant after construction (the digests' values are written as set_digest() says).
  const std::shared_ptr<const Plan> plan_;
  const std::vector<Segment> segments_;
  const bool in_waves_;
  std::vector<std::vector<std::vector<format::Digest>>> digests_;  // [file][index][chunk]

  std::atomic<std::uint64_t> bytes_staged_{0};

  mutable base::Mutex mutex_;
  base::ConditionVariable changed_;
  std::vector<memory::Lease> leases_ STRANDLINE_GUARDED_BY(mutex_);
  std::vector<bool> filled_ STRANDLINE_GUARDED_BY(mutex_);
  std::size_t segments_filled_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  std::vector<bool> released_ STRANDLINE_GUARDED_BY(mutex_);
  std::optional<Error> error_ STRANDLINE_GUARDED_BY(mutex_);
  std::function<void(const Status&)> when_ended_ STRANDLINE_GUARDED_BY(mutex_);
};

}  // namespace strandline::staging
