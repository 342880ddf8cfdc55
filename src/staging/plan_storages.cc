// Lays out the storages that a state's tensors lie in.
//
// Problem. A stager gives tensors back, not files: two views of one storage must be views of one
// storage again, with their strides, and nothing says how much of it they reach. Copying whole
// storages copies a gigabyte for one row of an embedding; copying tensors loses that they share.
//
// Approach. One pass in tree order gathers for each storage, told apart by device and base address,
// the hull of what its tensors reach: from the first byte to the last. What lies between and is
// reached by nobody is copied along: a hull is one copy and keeps every stride. The hulls become
// extents one after the other in one range of memory.
//
// Alignment. Frameworks count offsets in elements, so that an element must lie at a multiple of its
// size in the extent if it does in the storage. A hull that begins where some view does is right
// for that view, but not for others (bytes 1 to 9 of a storage, and its floats from byte 4 on).
// Where views begin at different places the hull is therefore extended to the front, to a multiple
// of the largest element there is: at most 15 bytes, all of them inside the storage. Types are not
// asked: adapters hand over views of bytes, whatever the elements are.
//
// Rejected: following overlaps of storages with different bases (each names its own memory, and a
// framework that gives two bases gives two storages back), and extents that leave out holes
// (strides would have to change).

#include <algorithm>
#include <limits>
#include <string>
#include <unordered_map>
#include <utility>

#include "base/checked_math.h"
#include "base/result_macros.h"
#include "staging/check_views.h"
#include "staging/plan.h"

namespace strandline::staging {
namespace {

// The largest element that a framework counts offsets in: a complex number of two doubles.
constexpr std::uint64_t kElementBytesMax = 16;

// What is reached of one storage; offsets in bytes from its base.
struct Reached {
  std::uint32_t first_tensor = 0;
  std::int64_t first_offset = 0;  // Of that tensor: of its first element,
  std::int64_t first_low = 0;     // and of the first byte that it reaches, relative to that.
  bool different = false;         // Whether any other tensor differs in one of them.
  std::uint64_t begin = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t end = 0;
  std::vector<std::shared_ptr<const void>> keep_alives;  // Neighbours differ.
};

struct StorageKey {
  DeviceId device;
  const std::byte* base = nullptr;
  bool operator==(const StorageKey&) const = default;
};

struct StorageKeyHash {
  std::size_t operator()(const StorageKey& key) const {
    return std::hash<std::string>()(key.device.kind) ^ std::hash<int>()(key.device.index) * 31 ^
           std::hash<const std::byte*>()(key.base);
  }
};

// Where the first element lies in its storage. REQUIRES: a view with elements, checked.
std::uint64_t offset_in_storage(const TensorView& view) {
  return static_cast<std::uint64_t>(view.data - view.storage_base);
}

void reach(const TensorView& view, bool is_first, Reached& storage) {
  const auto [low, high] = view.reach_bytes();
  const auto offset = static_cast<std::int64_t>(offset_in_storage(view));
  if (is_first) {
    storage.first_offset = offset;
    storage.first_low = low;
  } else if (offset != storage.first_offset || low != storage.first_low) {
    storage.different = true;
  }
  storage.begin = std::min(storage.begin, static_cast<std::uint64_t>(offset + low));
  storage.end = std::max(storage.end, static_cast<std::uint64_t>(offset + high));
  if (view.keep_alive != nullptr &&
      (storage.keep_alives.empty() || storage.keep_alives.back() != view.keep_alive)) {
    storage.keep_alives.push_back(view.keep_alive);
  }
}

// The bytes of an extent as a tensor.
TensorView extent_view(const TensorView& first, Reached storage) {
  TensorView view =
      TensorView::row_major(const_cast<std::byte*>(first.storage_base) + storage.begin, DType::kU8,
                            {storage.end - storage.begin});
  view.device = first.device;
  view.stream = first.stream;
  view.writable = false;
  if (storage.keep_alives.size() == 1) {
    view.keep_alive = std::move(storage.keep_alives.front());
  } else if (!storage.keep_alives.empty()) {
    view.keep_alive = std::make_shared<const std::vector<std::shared_ptr<const void>>>(
        std::move(storage.keep_alives));
  }
  return view;
}

Status streams_differ(const StateDict& state, std::uint32_t tensor, std::uint32_t first) {
  const Structure& structure = state.structure();
  Error error{.code = ErrorCode::kInvalidArgument,
              .key_path = structure.path_text(structure.tensors()[tensor].node)};
  error.message = "cannot stage '" + error.key_path + "': it lies in the storage of '" +
                  structure.path_text(structure.tensors()[first].node) +
                  "', but names another stream: synchronise the two and name one";
  return failure(std::move(error));
}

// The storages that tensors reach, in the order of their first tensors, and which one each tensor
// lies in (none: it has no elements).
struct Storages {
  std::vector<Reached> reached;
  std::vector<std::optional<std::uint32_t>> of_tensor;
};

Result<Storages> find_storages(const StateDict& state) {
  Storages storages;
  std::unordered_map<StorageKey, std::uint32_t, StorageKeyHash> known;
  storages.of_tensor.resize(state.tensors().size());
  for (std::uint32_t i = 0; i < state.tensors().size(); ++i) {
    const TensorView& view = state.tensors()[i];
    if (view.element_count() == 0) continue;
    const auto [entry, is_new] = known.try_emplace(
        {view.device, view.storage_base}, static_cast<std::uint32_t>(storages.reached.size()));
    if (is_new) storages.reached.push_back({.first_tensor = i, .keep_alives = {}});
    Reached& storage = storages.reached[entry->second];
    if (state.tensors()[storage.first_tensor].stream != view.stream) {
      return failure(streams_differ(state, i, storage.first_tensor).error());
    }
    reach(view, is_new, storage);
    storages.of_tensor[i] = entry->second;
  }
  // Tensors without elements reach nothing, but stay with their storage where that is staged.
  for (std::uint32_t i = 0; i < state.tensors().size(); ++i) {
    const TensorView& view = state.tensors()[i];
    if (view.element_count() > 0 || view.storage_base == nullptr) continue;
    const auto entry = known.find({view.device, view.storage_base});
    if (entry != known.end()) storages.of_tensor[i] = entry->second;
  }
  return storages;
}

// Where a tensor's first element lies in the extent; one without elements that would lie outside of
// it lies at its beginning.
std::uint64_t offset_in_extent(const TensorView& view, const Reached& storage) {
  if (view.element_count() > 0) return offset_in_storage(view) - storage.begin;
  const auto base = reinterpret_cast<std::uintptr_t>(view.storage_base);
  const auto data = reinterpret_cast<std::uintptr_t>(view.data);
  const bool inside = data >= base + storage.begin && data <= base + storage.end;
  return inside ? data - base - storage.begin : 0;
}

}  // namespace

Result<StoragePlan> plan_storages(const StateDict& state) {
  STRANDLINE_RETURN_IF_ERROR(check_views(state, "stage"));
  STRANDLINE_ASSIGN_OR_RETURN(Storages storages, find_storages(state));
  auto plan = std::make_shared<Plan>();
  plan->layout = Layout::kStorage;
  StoragePlan result;
  FilePlan file{
      .group = {}, .name = {}, .index_name = {}, .header = {}, .tensors = {}, .data_bytes = 0};
  for (Reached& storage : storages.reached) {
    if (storage.different) storage.begin = storage.begin / kElementBytesMax * kElementBytesMax;
    const std::uint64_t bytes = storage.end - storage.begin;
    const std::uint64_t offset = base::round_up(file.data_bytes, kExtentAlignmentBytes);
    const auto end = base::checked_add(offset, bytes);
    if (!end || *end > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      return failure(ErrorCode::kInvalidArgument,
                     "the storages of the state together overflow 64 bits");
    }
    file.tensors.push_back(
        {.tensor = storage.first_tensor, .name = {}, .offset = offset, .bytes = bytes});
    file.data_bytes = *end;
  }
  for (std::uint32_t i = 0; i < state.tensors().size(); ++i) {
    const auto& extent = storages.of_tensor[i];
    const std::uint64_t offset =
        extent ? offset_in_extent(state.tensors()[i], storages.reached[*extent]) : 0;
    plan->places.push_back({.extent = extent, .offset_bytes = offset});
  }
  for (Reached& storage : storages.reached) {
    const TensorView& first = state.tensors()[storage.first_tensor];
    result.extents.push_back(extent_view(first, std::move(storage)));
  }
  if (!file.tensors.empty()) plan->files.push_back(std::move(file));
  result.plan = std::move(plan);
  return result;
}

}  // namespace strandline::staging
