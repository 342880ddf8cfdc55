// The one way from a training job's memory into a snapshot.
//
// Problem. The trainer stands still while its state is copied, so the copy should use what the
// machine has and nothing else may be waited for. But memory is bounded: the snapshot before may
// still be on its way to the disk, and the state may be larger than the ceiling.
//
// Approach. plan -> lease -> copy. Where all files fit under the ceiling at once, they are leased
// together before anything is copied: then nothing but the copy can hold the caller up, and the
// snapshot may be kept as long as anyone likes. Otherwise the files are cut into segments of half
// the ceiling, leased and filled one after the other: while the consumer writes one, the next is
// filled. Two halves, not more, because each border costs a wait and a segment is large anyway.
//
// Turns. Two snapshots that each hold a part of the memory and wait for more would wait for ever,
// and so would a snapshot whose consumer is busy with a later one that waits for the earlier. So
// leasing goes by turns: a take has the turn from its first lease until `started` has handed the
// snapshot to the consumer, in waves until its last segment is leased and filled. A take that fits
// at once copies outside its turn, so several can copy together. What the take waits for of others
// has one deadline; what it waits for of its own has one per wave.
//
// Extents. Results of a stager (kStorage) go the same way as one segment, with three differences.
// They are never in waves, because nobody consumes them. They never wait for memory: its holders
// may hold it for ever, so a state that does not fit beside them fails at once. And the take may
// leave while devices still copy: the job goes on by itself then, driven by completions, and ends
// the snapshot, which tells whoever asked to be told.
//
// Failure. Whatever fails, the snapshot fails with it, so the consumer that was given it by
// `started` stops too; and a consumer that abandons the snapshot ends the take. Memory and
// keep-alives that a device still uses are held by its completions (copy_job.cc).
//
// Rejected: copying what fits while waiting for memory for the rest (the trainer is blocked all the
// same and memory is held idle), and a second engine for stagers (every fault is found twice).

#include "staging/snapshotter.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/checked_math.h"
#include "base/no_throw.h"
#include "base/result_macros.h"
#include "staging/copy_job.h"

namespace strandline::staging {
namespace {

using memory::kPageBytes;

constexpr base::Clock::Instant kDoNotWait{};  // Long past.

constexpr const char* kNoTurn =
    "another snapshot was still being staged: save less often, or raise host_bytes_max, or "
    "memory_wait if saves may wait";

static_assert(kWavesHostBytesMin / 2 >= 2 * format::kDigestChunkBytes,
              "a chunk that a segment's border cuts must end in the next segment");
static_assert(kWavesHostBytesMin / 2 % kPageBytes == 0);

// The pages that all files take at once. REQUIRES: a plan of plan_files(), whose sum fits easily.
std::uint64_t page_bytes(const Plan& plan) {
  std::uint64_t bytes = 0;
  for (const FilePlan& file : plan.files) bytes += base::round_up(file.file_bytes(), kPageBytes);
  return bytes;
}

std::vector<Segment> cut_files(const Plan& plan, std::uint64_t segment_bytes_max) {
  std::vector<Segment> segments;
  for (std::uint32_t file = 0; file < plan.files.size(); ++file) {
    const std::uint64_t file_bytes = plan.files[file].file_bytes();
    for (std::uint64_t offset = 0; offset < file_bytes; offset += segment_bytes_max) {
      segments.push_back({.file = file,
                          .file_offset = offset,
                          .bytes = std::min(segment_bytes_max, file_bytes - offset)});
    }
  }
  return segments;
}

Error cannot_stream(std::uint64_t needed, std::uint64_t bytes_max, const std::string& why) {
  return Error{.code = ErrorCode::kMemoryLimit,
               .message = "the state takes " + std::to_string(needed) +
                          " bytes of host memory, more than the ceiling (host_bytes_max) of " +
                          std::to_string(bytes_max) + " bytes, and " + why +
                          ": raise host_bytes_max to " + std::to_string(needed) +
                          " bytes, or save less"};
}

// The wait of one wave for its own.
base::Wait own_wait(const TakeOptions& options) {
  // Waits are real time, whatever clock the engine runs on.
  return base::Wait(base::deadline_after(std::chrono::steady_clock::now(), options.wave_wait),
                    options.interrupted);
}

// Fails if the consumer has abandoned the snapshot. REQUIRES: staging has not failed it.
Status check_consumer(const Snapshot& snapshot, TakeTimings& timings) {
  Status status = snapshot.status();
  timings.failed_by_consumer = !status;
  return status;
}

}  // namespace

Snapshotter::Snapshotter(Options options, const device::Registry& devices, base::Executor* workers,
                         const base::Clock& clock)
    : slab_(std::move(options.slab)), devices_(devices), workers_(workers), clock_(clock) {}

Result<std::shared_ptr<Snapshot>> Snapshotter::take(const StateDict& state,
                                                    const TakeOptions& options,
                                                    TakeTimings* timings) {
  TakeTimings spent;
  const base::Clock::Instant began = clock_.now();
  STRANDLINE_ASSIGN_OR_RETURN(StoragePlan plan, make_plan(state, options.layout));
  const base::Clock::Instant planned = clock_.now();
  spent.plan_ms = base::milliseconds_between(began, planned);

  base::Wait wait(options.deadline, options.interrupted);
  base::Wait do_not_wait(kDoNotWait);
  base::Turn turn(turns_);
  // With kStorage a turn is short: nobody waits for memory in it.
  const bool patient = options.wait_for_memory || options.layout == Layout::kStorage;
  STRANDLINE_RETURN_IF_ERROR(turn.begin(patient ? wait : do_not_wait, kNoTurn));
  spent.wait_ms = base::milliseconds_between(planned, clock_.now());
  STRANDLINE_ASSIGN_OR_RETURN(std::shared_ptr<Snapshot> snapshot,
                              lay_snapshot(std::move(plan.plan), options));
  const CopyJob::Source source{
      .views = options.layout == Layout::kStorage ? plan.extents : state.tensors(),
      .devices = &devices_,
      .structure = state.shared_structure()};
  Status staged = base::no_throw(
      "copying the state", [&] { return stage(snapshot, source, options, turn, wait, spent); });
  if (staged && options.wait_for_devices) staged = check_consumer(*snapshot, spent);
  spent.copy_ms = base::milliseconds_between(planned, clock_.now()) - spent.wait_ms;
  if (timings != nullptr) *timings = spent;
  if (!staged) {
    snapshot->fail(staged.error());
    return failure(std::move(staged).error());
  }
  return snapshot;
}

Result<StoragePlan> Snapshotter::make_plan(const StateDict& state, Layout layout) const {
  STRANDLINE_RETURN_IF_ERROR(state.construction());
  StoragePlan plan;
  if (layout == Layout::kStorage) {
    STRANDLINE_ASSIGN_OR_RETURN(plan, plan_storages(state));
  } else {
    STRANDLINE_ASSIGN_OR_RETURN(plan.plan, plan_files(state));
  }
  for (std::size_t i = 0; i < state.tensors().size(); ++i) {
    const DeviceId& device = state.tensors()[i].device;
    if (devices_.find(device.kind) != nullptr) continue;
    Error error{.code = ErrorCode::kUnsupported,
                .key_path = state.structure().path_text(state.structure().tensors()[i].node)};
    error.message = "'" + error.key_path + "' is on device '" + device.kind +
                    "', which this build cannot copy from: move it to the host first";
    return failure(std::move(error));
  }
  return plan;
}

// The snapshot without memory.
Result<std::shared_ptr<Snapshot>> Snapshotter::lay_snapshot(std::shared_ptr<const Plan> plan,
                                                            const TakeOptions& options) {
  const std::uint64_t needed = page_bytes(*plan);
  STRANDLINE_RETURN_IF_ERROR(slab_.adapt(needed));
  const std::uint64_t bytes_max = slab_.host_bytes_max();
  const bool in_waves = needed > bytes_max;
  if (in_waves && options.layout == Layout::kStorage) return failure(beside_results(needed));
  if (in_waves && bytes_max < kWavesHostBytesMin) {
    return failure(cannot_stream(needed, bytes_max,
                                 "a ceiling below " + std::to_string(kWavesHostBytesMin) +
                                     " bytes is too small to stream it in waves"));
  }
  if (in_waves && !options.started) {
    return failure(cannot_stream(
        needed, bytes_max, "it cannot stream in waves without somebody who takes them meanwhile"));
  }
  // At once every file is one segment, whatever its size.
  const std::uint64_t segment_bytes_max =
      in_waves ? bytes_max / 2 / kPageBytes * kPageBytes : base::round_up(needed + 1, kPageBytes);
  std::vector<Segment> segments = cut_files(*plan, segment_bytes_max);
  return std::make_shared<Snapshot>(std::move(plan), std::move(segments), in_waves);
}

// Fills the segments: all at once, or one by one in waves.
Status Snapshotter::stage(const std::shared_ptr<Snapshot>& snapshot, const CopyJob::Source& source,
                          const TakeOptions& options, base::Turn& turn, base::Wait& wait,
                          TakeTimings& timings) {
  const std::size_t segments = snapshot->segments().size();
  const std::size_t wave_segments = snapshot->in_waves() ? 1 : segments;
  OpenDigest open;
  std::size_t first = 0;
  do {
    const std::size_t last = std::min(first + wave_segments, segments);
    STRANDLINE_ASSIGN_OR_RETURN(std::vector<CopyJob::Target> targets,
                                lease(*snapshot, first, last, options, wait, timings));
    if (first == 0) {
      if (options.started) STRANDLINE_RETURN_IF_ERROR(options.started(snapshot));
      if (!snapshot->in_waves()) turn.end();
    }
    STRANDLINE_RETURN_IF_ERROR(check_consumer(*snapshot, timings));
    auto job = std::make_shared<CopyJob>(snapshot, std::move(targets), source, std::move(open));
    copy(job);
    if (!options.wait_for_devices) {
      job->leave();
      return {};
    }
    base::Wait devices = own_wait(options);
    STRANDLINE_RETURN_IF_ERROR(job->wait(devices));
    open = job->take_open();
    first = last;
  } while (first < segments);
  return {};
}

// The memory of the segments [first, last). Memory that this snapshot's own consumer holds is
// waited for under either policy.
Result<std::vector<CopyJob::Target>> Snapshotter::lease(Snapshot& snapshot, std::size_t first,
                                                        std::size_t last,
                                                        const TakeOptions& options,
                                                        base::Wait& wait, TakeTimings& timings) {
  const bool extents = options.layout == Layout::kStorage;
  base::Wait do_not_wait(kDoNotWait);
  base::Wait own_consumer = own_wait(options);
  base::Wait& earlier = options.wait_for_memory && !extents ? wait : do_not_wait;
  std::vector<std::uint64_t> sizes;
  std::uint64_t needed = 0;
  for (std::size_t i = first; i < last; ++i) {
    sizes.push_back(snapshot.segments()[i].bytes);
    needed += base::round_up(sizes.back(), kPageBytes);
  }
  const base::Clock::Instant waiting = clock_.now();
  Result<std::vector<memory::Lease>> leases =
      slab_.lease(sizes, first > 0 ? own_consumer : earlier);
  timings.wait_ms += base::milliseconds_between(waiting, clock_.now());
  if (!leases) {
    const bool taken = leases.error().code == ErrorCode::kTimeout;
    if (taken && extents) {
      // Stagers do not wait; it may also be places that are missing, or memory of the host.
      const std::uint64_t held = slab_.bytes_in_use();
      const std::uint64_t bytes_max = slab_.host_bytes_max();
      if (needed > bytes_max - std::min(held, bytes_max)) return failure(beside_results(needed));
      Error error = std::move(leases).error();
      error.code = ErrorCode::kMemoryLimit;
      return failure(std::move(error));
    }
    timings.failed_by_consumer = taken;
    return failure(std::move(leases).error());
  }
  std::vector<CopyJob::Target> targets;
  for (std::size_t i = first; i < last; ++i) {
    snapshot.set_lease(i, (*leases)[i - first]);
    targets.push_back({.segment = i, .lease = std::move((*leases)[i - first])});
  }
  return targets;
}

Error Snapshotter::beside_results(std::uint64_t needed) const {
  return Error{.code = ErrorCode::kMemoryLimit,
               .message = "the state takes " + std::to_string(needed) +
                          " bytes of host memory, earlier results that are still held (here, by "
                          "another process, or on the way to one) take " +
                          std::to_string(slab_.bytes_in_use()) +
                          ", and the ceiling (host_bytes_max) is " +
                          std::to_string(slab_.host_bytes_max()) +
                          " bytes: drop earlier results, raise host_bytes_max, or stage less"};
}

// Starts every copy of the job, with the workers' help.
void Snapshotter::copy(const std::shared_ptr<CopyJob>& job) {
  if (workers_ != nullptr && job->task_count() > 1) {
    const std::size_t helpers =
        std::min<std::size_t>(workers_->concurrency(), job->task_count() - 1);
    for (std::size_t i = 0; i < helpers; ++i) {
      // Weak: an entry that waits in the queue must not hold the job's memory.
      const Status posted = base::no_throw("asking for help", [&]() -> Status {
        workers_->post([weak = std::weak_ptr<CopyJob>(job)] {
          if (const auto alive = weak.lock()) alive->help();
        });
        return {};
      });
      if (!posted) break;  // The caller copies with fewer of them.
    }
  }
  job->help();
}

}  // namespace strandline::staging
