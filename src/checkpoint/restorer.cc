// Restoring and loading.
//
// Everything that can be refused is refused before the first byte of the destination changes:
// names, shapes, dtypes, read-only and self-overlapping tensors, conflicting values for shared
// memory, and damage of manifests, headers and rank files. The tensors' own bytes are checked chunk
// by chunk on their way in. If one of those is damaged, the destination holds a mixture until an
// older checkpoint has been read over it; `verify_first` reads everything twice to avoid that.

#include "checkpoint/restorer.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <new>
#include <set>
#include <utility>

#include "base/result_macros.h"
#include "checkpoint/match.h"
#include "checkpoint/newest.h"
#include "checkpoint/overlap.h"

namespace strandline::checkpoint {
namespace {

// Memory of the engine's own; 64 bytes suit every element type and vector unit.
Result<TensorView> allocate_on_heap(const Structure& structure, std::uint32_t tensor) {
  constexpr std::align_val_t kAlignment{64};
  const Structure::Tensor& saved = structure.tensors()[tensor];
  const std::uint64_t bytes = saved.byte_count();
  auto* memory = static_cast<std::byte*>(::operator new(bytes, kAlignment, std::nothrow));
  if (memory == nullptr) {
    return failure(ErrorCode::kMemoryLimit, fmt::format("no memory for {} bytes", bytes));
  }
  TensorView view = TensorView::row_major(memory, saved.dtype, saved.shape);
  view.framework = saved.framework;
  view.keep_alive = std::shared_ptr<std::byte>(
      memory, [](std::byte* allocated) { ::operator delete(allocated, kAlignment); });
  return view;
}

Error at_key(Error error, const Structure& structure, std::uint32_t tensor) {
  error.key_path = structure.path_text(structure.tensors()[tensor].node);
  return error;
}

// Whether restore can write through the view, element by element.
Status check_destination(const TensorView& view) {
  STRANDLINE_RETURN_IF_ERROR(view.check());
  if (view.device.kind != DeviceId{}.kind) {
    return failure(
        ErrorCode::kUnsupported,
        fmt::format("the tensor in the state is on device '{}', which cannot be restored "
                    "into; restore into host memory and copy from there",
                    view.device.kind));
  }
  if (!view.writable) {
    return failure(ErrorCode::kInvalidArgument,
                   "the tensor in the state is read-only; give a writable copy");
  }
  for (std::size_t i = 0; i < view.shape.size(); ++i) {
    if (view.shape[i] > 1 && view.strides_bytes[i] == 0 && view.element_count() > 0) {
      return failure(ErrorCode::kInvalidArgument,
                     "the tensor in the state is expanded: several elements share one place in "
                     "memory; make it contiguous before restoring");
    }
  }
  return {};
}

// One attempt: from one checkpoint into the state.
class Attempt {
 public:
  Attempt(const Checkpoint& checkpoint, StateDict& state, const RestoreOptions& options,
          std::set<std::string>& overwritten)
      : checkpoint_(checkpoint),
        state_(state),
        options_(options),
        overwritten_(overwritten),
        destinations_(checkpoint) {}

  [[nodiscard]] Status run() {
    match_ = match(checkpoint_.tree(), state_, options_.objects);
    if (Status matched = check_match(match_, options_.strict); !matched) {
      Error error = std::move(matched).error();
      error.path = checkpoint_.path();
      return failure(std::move(error));
    }
    STRANDLINE_RETURN_IF_ERROR(place());
    if (options_.accept) STRANDLINE_RETURN_IF_ERROR(options_.accept(checkpoint_));
    STRANDLINE_RETURN_IF_ERROR(verify_first());
    STRANDLINE_RETURN_IF_ERROR(read());
    for (const auto& [saved, own] : match_.values) {
      state_.values()[own] = checkpoint_.tree().values()[saved];
    }
    return {};
  }

  [[nodiscard]] Restored take_result() {
    Restored restored;
    restored.step = checkpoint_.info().step;
    restored.state = std::move(destinations_.state());
    restored.destination = std::move(match_.destination);
    restored.missing = std::move(match_.missing);
    restored.unexpected = std::move(match_.unexpected);
    return restored;
  }

 private:
  [[nodiscard]] Status place() {
    for (std::uint32_t i = 0; i < match_.destination.size(); ++i) {
      if (!match_.destination[i]) continue;
      const TensorView& view = state_.tensors()[*match_.destination[i]];
      if (Status usable = check_destination(view); !usable) {
        return failure(
            at_key(std::move(usable).error(), state_.structure(), *match_.destination[i]));
      }
      destinations_.set(i, view);
      own_.push_back(*match_.destination[i]);
    }
    STRANDLINE_RETURN_IF_ERROR(check_overlaps(checkpoint_, state_, destinations_.reads(), own_));
    const Structure& saved = checkpoint_.tree().structure();
    std::vector<bool> wanted(saved.tensors().size(), true);
    for (const std::uint32_t node : match_.unexpected_nodes) {
      for (std::uint32_t i = node; i < saved.nodes()[node].end; ++i) {
        if (saved.nodes()[i].kind == NodeKind::kTensor) wanted[saved.nodes()[i].leaf] = false;
      }
    }
    return destinations_.allocate(wanted, options_.allocate);
  }

  [[nodiscard]] Status verify_first() {
    if (!options_.verify_first) return {};
    STRANDLINE_ASSIGN_OR_RETURN(const std::vector<Damage> damages,
                                checkpoint_.verify(options_.progress));
    // A file that was added later is never read, and no reason to fall back to an older step.
    const auto damage = std::find_if_not(damages.begin(), damages.end(),
                                         [](const Damage& found) { return found.unlisted; });
    if (damage == damages.end()) return {};
    const bool is_gone = damage->code == ErrorCode::kNotFound;
    return failure(Error{.code = is_gone ? ErrorCode::kCorrupt : damage->code,
                         .message = damage->key_path.empty()
                                        ? damage->message
                                        : fmt::format("cannot read tensor '{}': {}",
                                                      damage->key_path, damage->message),
                         .key_path = damage->key_path,
                         .path = fmt::format("{}/{}", checkpoint_.path(), damage->file),
                         .system_errno = damage->system_errno});
  }

  [[nodiscard]] Status read() {
    std::size_t touched = 0;
    Status status = checkpoint_.read(destinations_.reads(), options_.progress, &touched);
    if (status) return status;
    // The reads into the state come first.
    for (std::size_t i = 0; i < std::min(touched, own_.size()); ++i) {
      if (state_.tensors()[own_[i]].byte_count() == 0) continue;
      overwritten_.insert(state_.structure().path_text(state_.structure().tensors()[own_[i]].node));
    }
    return status;
  }

  const Checkpoint& checkpoint_;
  StateDict& state_;
  const RestoreOptions& options_;
  std::set<std::string>& overwritten_;
  Destinations destinations_;
  Match match_;
  std::vector<std::uint32_t> own_;  // The state's tensor of each of the first reads.
};

}  // namespace

void Destinations::set(std::uint32_t tensor, TensorView view) {
  placed_[tensor] = true;
  reads_.push_back({tensor, view});
  state_.tensors()[tensor] = std::move(view);
}

Status Destinations::allocate_one(std::uint32_t tensor, const Allocator& allocate) {
  const Structure& structure = state_.structure();
  Result<TensorView> view =
      allocate ? allocate(structure, tensor) : allocate_on_heap(structure, tensor);
  if (!view) return failure(at_key(std::move(view).error(), structure, tensor));
  set(tensor, std::move(*view));
  return {};
}

Status Destinations::allocate(const std::vector<bool>& wanted, const Allocator& allocate) {
  const std::vector<StoredTensor>& stored = checkpoint_.stored();
  std::vector<std::uint32_t> order;
  for (std::uint32_t i = 0; i < stored.size(); ++i) {
    if (wanted[i] && !placed_[i]) order.push_back(i);
  }
  // Owners first, then aliases from the largest on: of several aliases whose owner is not wanted,
  // one that holds the others comes before them.
  std::stable_sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    if (!stored[a].alias_of || !stored[b].alias_of)
      return !stored[a].alias_of && stored[b].alias_of;
    return stored[a].bytes > stored[b].bytes;
  });
  std::map<std::uint32_t, std::vector<std::uint32_t>> allocated;  // By owner.
  for (const std::uint32_t i : order) {
    std::vector<std::uint32_t>& known = allocated[stored[i].alias_of.value_or(i)];
    const std::uint64_t element_bytes = std::max(dtype_bits(state_.tensors()[i].dtype) / 8, 1u);
    const auto holder = std::find_if(known.begin(), known.end(), [&](std::uint32_t other) {
      const std::uint64_t begin = stored[i].alias_offset_bytes;
      const std::uint64_t memory = stored[other].alias_offset_bytes;
      return memory <= begin && begin + stored[i].bytes <= memory + stored[other].bytes &&
             (begin - memory) % element_bytes == 0;
    });
    if (holder == known.end()) {
      STRANDLINE_RETURN_IF_ERROR(allocate_one(i, allocate));
      known.push_back(i);
    } else {
      share(i, *holder);
    }
  }
  return {};
}

// `tensor` becomes a view into the memory of `holder`, whose saved bytes contain its own.
void Destinations::share(std::uint32_t tensor, std::uint32_t holder) {
  const std::vector<StoredTensor>& stored = checkpoint_.stored();
  const TensorView& memory = state_.tensors()[holder];
  const std::uint64_t offset =
      stored[tensor].alias_offset_bytes - stored[holder].alias_offset_bytes;
  TensorView view = TensorView::row_major(memory.data + offset, state_.tensors()[tensor].dtype,
                                          state_.tensors()[tensor].shape);
  view.storage_base = memory.storage_base;
  view.storage_bytes = memory.storage_bytes;
  view.framework = state_.tensors()[tensor].framework;
  view.keep_alive = memory.keep_alive;
  state_.tensors()[tensor] = std::move(view);
}

Result<std::optional<RestoredFrom>> restore_into(Storage& storage, StateDict& state,
                                                 const RestoreOptions& options) {
  std::set<std::string> overwritten;
  std::optional<Restored> restored;
  std::vector<std::string> warnings;
  Result<std::optional<Checkpoint>> used = use_newest(
      storage, options.step,
      [&](const Checkpoint& checkpoint) -> Status {
        Attempt attempt(checkpoint, state, options, overwritten);
        STRANDLINE_RETURN_IF_ERROR(attempt.run());
        restored = attempt.take_result();
        return {};
      },
      warnings);
  if (!used) {
    Error error = std::move(used).error();
    error.message += overwritten.empty()
                         ? "; nothing was changed"
                         : fmt::format("; tensors of the state that were overwritten already: {}",
                                       fmt::join(overwritten, ", "));
    return failure(std::move(error));
  }
  if (!*used) return std::nullopt;
  restored->warnings = std::move(warnings);
  return RestoredFrom{std::move(*restored), (*used)->info().sequence};
}

}  // namespace strandline::checkpoint
