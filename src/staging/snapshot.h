// One generation of staged bytes, on its way from the training job to the disk.
//
// A snapshot's files are cut into segments: one per file when all of them fit under the memory
// ceiling at once, else waves. The Snapshotter fills segments in order; the ShardWriter takes them
// in the same order, writes them, and gives their memory back. A snapshot that was filled whole
// stays valid as long as anyone holds it, whatever is staged next.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
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
  Snapshot(std::shared_ptr<const Plan> plan, std::vector<Segment> segments);

  [[nodiscard]] const Plan& plan() const { return *plan_; }
  [[nodiscard]] const std::vector<Segment>& segments() const { return segments_; }
  [[nodiscard]] bool in_waves() const { return segments_.size() > plan_->files.size(); }

  // ---- Consumer ----

  // Waits until segment `index` is filled. Fails with what staging failed with, or kTimeout.
  [[nodiscard]] Result<std::span<const std::byte>> wait_segment(std::size_t index,
                                                                base::Clock::Instant deadline);
  // Gives the memory of a segment back (unless others hold its lease).
  void release_segment(std::size_t index);

  // The digests of a stored tensor's bytes, one per chunk, once its last segment is filled.
  [[nodiscard]] const std::vector<format::Digest>& digests(std::uint32_t file,
                                                           std::uint32_t index) const;

  [[nodiscard]] std::uint64_t bytes_staged() const { return bytes_staged_.load(); }

  // ---- Producer ----

  void set_lease(std::size_t index, memory::Lease lease);
  [[nodiscard]] std::span<std::byte> segment_memory(std::size_t index);
  void set_filled(std::size_t index);
  void add_bytes_staged(std::uint64_t bytes) { bytes_staged_.fetch_add(bytes); }
  // Each chunk's digest is set by one thread, before set_filled() of the segment it ends in.
  void set_digest(std::uint32_t file, std::uint32_t index, std::uint64_t chunk,
                  format::Digest digest);
  // Ends the snapshot with an error; only the first counts. Waiters are woken.
  void fail(Error error);

 private:
  // Constant after construction (the digests' values are written as set_digest() says).
  const std::shared_ptr<const Plan> plan_;
  const std::vector<Segment> segments_;
  std::vector<std::vector<std::vector<format::Digest>>> digests_;  // [file][index][chunk]

  std::atomic<std::uint64_t> bytes_staged_{0};

  base::Mutex mutex_;
  base::ConditionVariable changed_;
  std::vector<memory::Lease> leases_ STRANDLINE_GUARDED_BY(mutex_);
  std::vector<bool> filled_ STRANDLINE_GUARDED_BY(mutex_);
  std::optional<Error> error_ STRANDLINE_GUARDED_BY(mutex_);
};

}  // namespace strandline::staging
