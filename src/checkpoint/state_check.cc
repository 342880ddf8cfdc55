#include "checkpoint/state_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "base/result_macros.h"
#include "format/json_text.h"
#include "format/manifest.h"
#include "format/names.h"
#include "staging/copy_workers.h"

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

// Recursion as deep as the value, which destroying it needs as well.
bool is_text_valid(const Value& value) {
  if (const auto* text = value.get_if<std::string>()) return format::is_valid_utf8(*text);
  const auto all_valid = [](const std::vector<Value>& values) {
    return std::all_of(values.begin(), values.end(), is_text_valid);
  };
  if (const auto* list = value.get_if<Value::List>()) return all_valid(*list);
  if (const auto* tagged = value.get_if<Value::Tagged>()) {
    return format::is_valid_utf8(tagged->tag) && all_valid(tagged->fields);
  }
  return true;
}

// The manifest is JSON, which cannot hold other text; found here, before anything is copied.
Status check_text(const StateDict& state) {
  const Structure& structure = state.structure();
  for (std::uint32_t i = 0; i < structure.nodes().size(); ++i) {
    const Structure::Node& node = structure.nodes()[i];
    const bool valid = is_text_valid(node.key) &&
                       (node.kind != NodeKind::kValue || is_text_valid(state.values()[node.leaf]));
    if (valid) continue;
    return failure(Error{.code = ErrorCode::kUnsupported,
                         .message = fmt::format("'{}' is, or holds, text that is not UTF-8; save "
                                                "it as bytes",
                                                structure.path_text(i)),
                         .key_path = structure.path_text(i)});
  }
  return {};
}

// What a value takes in the manifest, at the least. Recursion as deep as the value.
std::uint64_t manifest_bytes_min(const Value& value) {
  const auto sum = [](const std::vector<Value>& values) {
    std::uint64_t bytes = 0;
    for (const Value& each : values) bytes += 1 + manifest_bytes_min(each);
    return bytes;
  };
  if (const auto* text = value.get_if<std::string>()) return text->size();
  if (const auto* bytes = value.get_if<Value::Bytes>()) return bytes->data.size() / 3 * 4;
  if (const auto* number = value.get_if<Value::BigInteger>()) return number->decimal.size();
  if (const auto* list = value.get_if<Value::List>()) return sum(*list);
  if (const auto* tagged = value.get_if<Value::Tagged>()) return sum(tagged->fields);
  return 1;
}

// Found here, before anything is copied; what only just does not fit is found when it is written.
Status check_size(const StateDict& state) {
  const Structure& structure = state.structure();
  std::uint64_t total = 0;
  std::uint64_t largest_bytes = 0;
  std::uint32_t largest = 0;
  for (std::uint32_t i = 0; i < structure.nodes().size(); ++i) {
    const Structure::Node& node = structure.nodes()[i];
    if (node.kind != NodeKind::kValue) continue;
    const std::uint64_t bytes = manifest_bytes_min(state.values()[node.leaf]);
    total += bytes;
    if (bytes <= largest_bytes) continue;
    largest_bytes = bytes;
    largest = i;
  }
  if (total <= format::kManifestBytesMax) return {};
  return failure(
      Error{.code = ErrorCode::kUnsupported,
            .message = fmt::format("the plain values take {} bytes or more, and the manifest holds "
                                   "{} at most; the largest is '{}' with {}: save it as an array",
                                   total, format::kManifestBytesMax, structure.path_text(largest),
                                   largest_bytes),
            .key_path = structure.path_text(largest)});
}

}  // namespace

Status check_options(const CheckpointerOptions& options) {
  if (options.keep && *options.keep == 0) {
    return failure(ErrorCode::kInvalidArgument,
                   "keep must be at least 1: the last good checkpoint is never deleted");
  }
  return staging::check_copy_threads(options.copy_threads);
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
  STRANDLINE_RETURN_IF_ERROR(check_text(state));
  STRANDLINE_RETURN_IF_ERROR(check_text(options.metadata));
  STRANDLINE_RETURN_IF_ERROR(check_size(state));
  STRANDLINE_RETURN_IF_ERROR(check_size(options.metadata));
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
