// The stagers: results in memory of their own, over the one Snapshotter.
//
// Problem. Whoever stages without saving gets the state itself back, and keeps it for as long as
// she likes: the tree, one view of it, a future of it. Meanwhile training goes on, the next state
// is staged, the stager is closed, and a device may not have finished copying.
//
// Approach. A staging is a Snapshot with the layout kStorage: one lease that holds all extents. The
// result is the caller's state with its views moved into that lease, each of which holds it. From
// then on nothing but the views knows the memory: the snapshot has released it, and the job drops
// it with the last byte that arrives. So the results' holders alone decide when it is used again,
// and nothing of the stager needs to live for it.
//
// Life cycle of an outstanding staging. The job is held by the completions that devices owe; it
// holds the snapshot; that holds the callback which ends the future, and in it the result. Whoever
// ends the snapshot (the last completion, a failing one, the watcher at the deadline) ends the
// future. On a failure the result goes first: who is told of it finds the memory free, unless a
// device may still write there. What the watcher ended the job still finishes: its late
// completions find a snapshot that has failed, and change nothing.
//
// The watcher is one thread that waits for outstanding stagings in order. All have the same
// patience, so the oldest's deadline is the first, and to wait for one after the other misses none.
// It holds them weakly, so that what has ended does not wait for its turn in order to go.
//
// Concurrency. stage() calls are independent of each other but for the slab. close() waits until
// none runs and none is outstanding (Activity), and then ends the threads.
//
// Rejected: copying on a background thread (host tensors would change under it), handing results
// out before the last byte is there, a pool of buffers by tensor (a state that changes its shapes
// would keep them all), and one thread per outstanding staging.

#include <utility>

#include "base/no_throw.h"
#include "base/result_macros.h"
#include "staging/copy_job.h"
#include "staging/copy_workers.h"
#include "staging/future_state.h"
#include "staging/stager_impl.h"

namespace strandline::staging {
namespace {

// How long a staging may wait for another thread's to lay hold of its memory. That waits for nobody
// in turn, so it is never reached unless the kernel hangs.
constexpr std::chrono::minutes kTurnWait(10);

// How long copying may take: more than any does, so that the deadlines of stagings decide when they
// end; without any bound a defect there would be a hang in close().
constexpr std::chrono::hours kCopyWait(1);

// Stagings that devices may owe copies to at once. One more waits for the oldest of them to end:
// memory bounds them far below.
constexpr std::size_t kOutstandingMax = 256;

// `state` with its tensors where `plan` puts them in `memory`.
StateDict in_staged_memory(const StateDict& state, const Plan& plan, const memory::Lease& memory) {
  StateDict staged = state;
  const auto holder = std::make_shared<const memory::Lease>(memory);
  for (std::size_t i = 0; i < staged.tensors().size(); ++i) {
    TensorView& view = staged.tensors()[i];
    const ExtentPlace& place = plan.places[i];
    view.device = {};
    view.stream = 0;
    view.writable = true;
    view.data = nullptr;
    view.storage_base = nullptr;
    view.storage_bytes = 0;
    view.keep_alive = nullptr;
    if (!place.extent) continue;
    const PlacedTensor& extent = plan.files.front().tensors[*place.extent];
    std::byte* const base = memory.data() + extent.offset;
    view.data = base + place.offset_bytes;
    view.storage_base = base;
    view.storage_bytes = extent.bytes;
    view.keep_alive = holder;
  }
  return staged;
}

Status check_options(const StateDictStager::Options& options) {
  if (options.device_wait < std::chrono::milliseconds(0)) {
    return failure(ErrorCode::kInvalidArgument, "device_wait is negative");
  }
  return check_copy_threads(options.copy_threads);
}

}  // namespace

Result<StagerParts> make_stager_parts(std::optional<std::uint32_t> copy_threads, bool outstanding) {
  STRANDLINE_RETURN_IF_ERROR(check_copy_threads(copy_threads));
  StagerParts parts;
  parts.clock = std::make_shared<base::SystemClock>();
  const auto devices = std::make_shared<const device::Registry>();
  parts.devices = devices;
  STRANDLINE_ASSIGN_OR_RETURN(parts.workers, start_copy_workers(copy_threads));
  if (outstanding && devices->knows_devices()) {
    STRANDLINE_ASSIGN_OR_RETURN(parts.watcher,
                                base::ThreadExecutor::start(1, kOutstandingMax, "strandline-wait"));
  }
  return parts;
}

}  // namespace strandline::staging

namespace strandline::inline v0 {

StateDictStager::Impl::Impl(const Options& given, staging::StagerParts given_parts)
    : options(given),
      parts(std::move(given_parts)),
      snapshotter({.slab = {.host_bytes_max = options.host_bytes_max,
                            .default_ceiling = memory::DefaultCeiling::kHalfOfFree,
                            .shared = options.share_memory,
                            .inherited = true}},  // Results are the user's, also in a child.
                  *parts.devices, parts.workers.get(), *parts.clock) {}

Result<std::shared_ptr<const void>> StateDictStager::Impl::begin() const {
  if (forked()) {
    return failure(ErrorCode::kUnavailable,
                   "this stager belongs to the process that forked; open one in the child");
  }
  std::shared_ptr<const void> busy = activity->begin();
  if (busy != nullptr) return busy;
  return failure(ErrorCode::kUnavailable, "the stager was closed; open another one");
}

Result<StateDictStager::Impl::Taken> StateDictStager::Impl::take(const StateDict& state,
                                                                 bool wait_for_devices) {
  staging::TakeOptions take;
  take.layout = staging::Layout::kStorage;
  take.deadline = base::deadline_after(std::chrono::steady_clock::now(), staging::kTurnWait);
  take.wave_wait = options.device_wait;
  take.wait_for_devices = wait_for_devices;
  STRANDLINE_ASSIGN_OR_RETURN(std::shared_ptr<staging::Snapshot> snapshot,
                              snapshotter.take(state, take, nullptr));
  Taken taken{.snapshot = std::move(snapshot), .staged = {}};
  memory::Lease memory;
  if (!taken.snapshot->segments().empty()) {
    memory = taken.snapshot->lease(0);
    if (!memory) return taken;
    taken.snapshot->release_segment(0);
  }
  taken.staged = staging::in_staged_memory(state, taken.snapshot->plan(), memory);
  return taken;
}

Result<StateDict> StateDictStager::Impl::stage(const StateDict& state) {
  STRANDLINE_ASSIGN_OR_RETURN(const std::shared_ptr<const void> busy, begin());
  STRANDLINE_ASSIGN_OR_RETURN(Taken taken, take(state, true));
  return *std::move(taken.staged);  // With the devices waited for, take() itself fails.
}

Result<Future<StateDict>> StateDictStager::Impl::stage_async(const StateDict& state) {
  STRANDLINE_ASSIGN_OR_RETURN(std::shared_ptr<const void> busy, begin());
  STRANDLINE_ASSIGN_OR_RETURN(Taken taken, take(state, false));
  const auto future = std::make_shared<Future<StateDict>::State>();
  taken.snapshot->when_ended(
      [future, busy, staged = std::move(taken.staged)](const Status& ended) mutable {
        if (ended) {
          future->end(*std::move(staged));
          return;
        }
        staged.reset();  // Its memory goes before anybody hears of the failure.
        future->end(failure(ended.error()));
      });
  if (!future->ended()) {
    const auto deadline =
        base::deadline_after(std::chrono::steady_clock::now(), options.device_wait);
    parts.watcher->post([weak = std::weak_ptr(taken.snapshot), deadline] {
      const auto snapshot = weak.lock();
      if (snapshot == nullptr || snapshot->wait_ended(deadline)) return;
      snapshot->fail({.code = ErrorCode::kTimeout, .message = staging::kDeviceTooSlow});
    });
  }
  return Future<StateDict>::State::handle(future);
}

Status StateDictStager::Impl::close() {
  if (forked()) return {};  // Nothing of it runs here.
  activity->close();
  snapshotter.retire();
  const auto deadline = base::deadline_after(
      std::chrono::steady_clock::now(),
      base::at_most_a_year(options.device_wait) + staging::kTurnWait + staging::kCopyWait);
  if (!activity->wait_until_idle(deadline)) {
    return failure(ErrorCode::kTimeout, "a staging of this stager does not end");
  }
  std::shared_ptr<base::Executor> workers;
  std::shared_ptr<base::Executor> watcher;
  base::MutexLock lock(mutex);
  workers.swap(parts.workers);
  watcher.swap(parts.watcher);
  return {};
}

Result<StateDictStager> StagerAccess::open(StateDictStager::Options options,
                                           staging::StagerParts parts) {
  STRANDLINE_RETURN_IF_ERROR(staging::check_options(options));
  return StateDictStager(std::make_shared<StateDictStager::Impl>(options, std::move(parts)));
}

Result<StateDictStager> StateDictStager::open(Options options) {
  STRANDLINE_RETURN_IF_ERROR(staging::check_options(options));
  STRANDLINE_ASSIGN_OR_RETURN(staging::StagerParts parts,
                              staging::make_stager_parts(options.copy_threads, false));
  return StagerAccess::open(options, std::move(parts));
}

StateDictStager::StateDictStager(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
StateDictStager::StateDictStager(StateDictStager&&) noexcept = default;
StateDictStager& StateDictStager::operator=(StateDictStager&& other) noexcept {
  std::swap(impl_, other.impl_);
  return *this;
}

StateDictStager::~StateDictStager() {
  if (!impl_) return;
  if (impl_->forked()) {
    // A forked child: its locks and threads are not ours.
    static_cast<void>(new std::shared_ptr<Impl>(std::move(impl_)));
    return;
  }
  close();
}

Result<StateDict> StateDictStager::stage(const StateDict& state) {
  return base::no_throw("staging", [&] { return impl_->stage(state); });
}

void StateDictStager::close() { static_cast<void>(impl_->close()); }

std::uint64_t StateDictStager::host_bytes_in_use() const {
  return impl_->forked() ? 0 : impl_->snapshotter.slab().bytes_in_use();
}

std::uint64_t StateDictStager::host_bytes_mapped() const {
  return impl_->forked() ? 0 : impl_->snapshotter.slab().bytes_mapped();
}

}  // namespace strandline::inline v0
