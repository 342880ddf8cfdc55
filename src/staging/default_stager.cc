// The stager that most use: options, and the choice whether devices are waited for. What it does is
// told in state_dict_stager.cc.

#include <utility>

#include "base/no_throw.h"
#include "base/result_macros.h"
#include "staging/stager_impl.h"

namespace strandline::inline v0 {
namespace {

Status check_config(const CheckpointStagerConfig& config, const device::Registry& devices) {
  if (!config.use_non_blocking_copy || devices.knows_devices()) return {};
  return failure(ErrorCode::kInvalidArgument,
                 "use_non_blocking_copy needs a device other than the host, and this build knows "
                 "none: set it to false");
}

StateDictStager::Options options_of(const CheckpointStagerConfig& config) {
  return {.pin_memory = config.use_pinned_memory,
          .share_memory = config.use_shared_memory,
          .host_bytes_max = config.host_bytes_max,
          .copy_threads = config.copy_threads,
          .device_wait = config.device_wait};
}

}  // namespace

Result<DefaultStager> StagerAccess::open(CheckpointStagerConfig config,
                                         staging::StagerParts parts) {
  STRANDLINE_RETURN_IF_ERROR(check_config(config, *parts.devices));
  STRANDLINE_ASSIGN_OR_RETURN(StateDictStager stager,
                              StagerAccess::open(options_of(config), std::move(parts)));
  return DefaultStager(config, std::move(stager));
}

Result<DefaultStager> DefaultStager::open(CheckpointStagerConfig config) {
  STRANDLINE_ASSIGN_OR_RETURN(
      staging::StagerParts parts,
      staging::make_stager_parts(config.copy_threads, config.use_async_staging));
  return StagerAccess::open(config, std::move(parts));
}

DefaultStager::DefaultStager(CheckpointStagerConfig config, StateDictStager stager)
    : config_(config), stager_(std::move(stager)) {}
DefaultStager::DefaultStager(DefaultStager&&) noexcept = default;
DefaultStager& DefaultStager::operator=(DefaultStager&&) noexcept = default;
DefaultStager::~DefaultStager() = default;

Result<Future<StateDict>> DefaultStager::stage(const StateDict& state) {
  if (config_.use_async_staging) {
    return base::no_throw("staging", [&] { return stager_.impl_->stage_async(state); });
  }
  STRANDLINE_ASSIGN_OR_RETURN(StateDict staged, stager_.stage(state));
  return Future<StateDict>(std::move(staged));
}

Status DefaultStager::close() { return stager_.impl_->close(); }

}  // namespace strandline::inline v0
