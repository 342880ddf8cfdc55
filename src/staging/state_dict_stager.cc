#include <utility>

#include "base/no_throw.h"
#include "base/result_macros.h"
#include "staging/copy_workers.h"
#include "staging/stager_impl.h"

namespace strandline::staging {
namespace {

// How long a staging may wait for another thread's to lay hold of its memory. That waits for nobody
// in turn, so it is never reached unless the kernel hangs.
constexpr std::chrono::minutes kTurnWait(10);

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

Result<StagerParts> make_stager_parts(std::optional<std::uint32_t> copy_threads) {
  STRANDLINE_RETURN_IF_ERROR(check_copy_threads(copy_threads));
  StagerParts parts;
  parts.clock = std::make_shared<base::SystemClock>();
  parts.devices = std::make_shared<device::Registry>();
  STRANDLINE_ASSIGN_OR_RETURN(parts.workers, start_copy_workers(copy_threads));
  return parts;
}

}  // namespace strandline::staging

namespace strandline::inline v0 {

StateDictStager::Impl::Impl(Options given, staging::StagerParts stager_parts)
    : options(given),
      parts(std::move(stager_parts)),
      snapshotter({.slab = {.host_bytes_max = options.host_bytes_max}}, *parts.devices,
                  parts.workers.get(), *parts.clock) {}

Status StateDictStager::Impl::check_usable() const {
  if (base::fork_generation() != fork_generation) {
    return failure(ErrorCode::kUnavailable,
                   "this stager belongs to the process that forked; open one in the child");
  }
  if (closed.load()) {
    return failure(ErrorCode::kUnavailable, "the stager was closed; open another one");
  }
  return {};
}

Result<StateDict> StateDictStager::Impl::stage(const StateDict& state) {
  staging::TakeOptions take;
  take.layout = staging::Layout::kStorage;
  take.deadline = base::deadline_after(std::chrono::steady_clock::now(), staging::kTurnWait);
  take.wave_wait = options.device_wait;
  STRANDLINE_ASSIGN_OR_RETURN(const std::shared_ptr<staging::Snapshot> snapshot,
                              snapshotter.take(state, take, nullptr));
  memory::Lease memory;
  if (!snapshot->segments().empty()) memory = snapshot->lease(0);
  return staging::in_staged_memory(state, snapshot->plan(), memory);
}

Result<StateDictStager> StagerAccess::open(StateDictStager::Options options,
                                           staging::StagerParts parts) {
  STRANDLINE_RETURN_IF_ERROR(staging::check_options(options));
  return StateDictStager(std::make_shared<StateDictStager::Impl>(options, std::move(parts)));
}

Result<StateDictStager> StateDictStager::open(Options options) {
  STRANDLINE_RETURN_IF_ERROR(staging::check_options(options));
  STRANDLINE_ASSIGN_OR_RETURN(staging::StagerParts parts,
                              staging::make_stager_parts(options.copy_threads));
  return StagerAccess::open(options, std::move(parts));
}

StateDictStager::StateDictStager(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
StateDictStager::StateDictStager(StateDictStager&&) noexcept = default;
StateDictStager& StateDictStager::operator=(StateDictStager&& other) noexcept {
  std::swap(impl_, other.impl_);
  return *this;
}

StateDictStager::~StateDictStager() {
  if (!impl_ || base::fork_generation() == impl_->fork_generation) return;
  // A forked child: its locks and threads are not ours.
  static_cast<void>(new std::shared_ptr<Impl>(std::move(impl_)));
}

Result<StateDict> StateDictStager::stage(const StateDict& state) {
  STRANDLINE_RETURN_IF_ERROR(impl_->check_usable());
  return base::no_throw("staging", [&] { return impl_->stage(state); });
}

void StateDictStager::close() { impl_->closed.store(true); }

std::uint64_t StateDictStager::host_bytes_in_use() const {
  return impl_->snapshotter.slab().bytes_in_use();
}

std::uint64_t StateDictStager::host_bytes_mapped() const {
  return impl_->snapshotter.slab().bytes_mapped();
}

}  // namespace strandline::inline v0
