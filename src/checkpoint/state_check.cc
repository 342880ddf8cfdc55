#include "checkpoint/state_check.h"

#include <fmt/format.h>

#include <string_view>

#include "base/result_macros.h"
#include "format/manifest.h"
#include "format/names.h"

namespace strandline::checkpoint {
namespace {

// Names that the step's own files have, or may have.
bool is_reserved(std::string_view name) {
  return name == format::kManifestName || name.starts_with("rank-") ||
         name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
}

Status check_extra_files(const SaveOptions& options) {
  for (const auto& [name, content] : options.extra_files) {
    if (format::is_file_name(name) && !is_reserved(name)) continue;
    return failure(ErrorCode::kInvalidArgument,
                   fmt::format("an extra file cannot be called '{}': use letters, digits and "
                               "'._~-', no leading dot, and none of the checkpoint's own names",
                               name));
  }
  return {};
}

}  // namespace

Status check_options(const CheckpointerOptions& options) {
  if (options.keep && *options.keep == 0) {
    return failure(ErrorCode::kInvalidArgument,
                   "keep must be at least 1: the last good checkpoint is never deleted");
  }
  return {};
}

Status check_arguments(std::int64_t step, const StateDict& state, const SaveOptions& options) {
  if (step < 0) {
    return failure(
        ErrorCode::kInvalidArgument,
        fmt::format("step {} is negative; a step is the number of steps completed", step));
  }
  STRANDLINE_RETURN_IF_ERROR(state.construction());
  STRANDLINE_RETURN_IF_ERROR(options.metadata.construction());
  if (!options.metadata.tensors().empty()) {
    return failure(ErrorCode::kInvalidArgument,
                   "metadata holds a tensor; put tensors into the state");
  }
  return check_extra_files(options);
}

StateDict without_memory(const StateDict& state) {
  StateDict copy = state;
  for (TensorView& view : copy.tensors()) {
    view.data = nullptr;
    view.storage_base = nullptr;
    view.storage_bytes = 0;
    view.keep_alive.reset();
  }
  return copy;
}

}  // namespace strandline::checkpoint
