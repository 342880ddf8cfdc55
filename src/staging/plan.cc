// Lays a state out as safetensors files.
//
// Problem. The state names tensors whose memory may be shared: tied weights are two names for one
// range, a slice lies inside its parent, a window overlaps another. Files must hold every byte
// once where that is possible, because a restore that gives tied weights back as one tensor needs
// to know, and in full where it is not, because safetensors has no strides and no aliases.
//
// Approach. Per group, the views whose elements lie in row-major order and are their own values are
// intervals of addresses. Sorted by where they begin (longer ones first), one sweep finds for each
// the earlier one that reaches furthest; an interval that ends before it lies inside it and becomes
// an alias. That is exact: if any earlier interval contains it, the one that reaches furthest
// does. An alias must begin at a multiple of its element size in its owner, else it is stored.
// Everything that remains (strided, expanded, conj, neg, overlapping) is compared as a whole: equal
// views become aliases of the first of them in tree order. So an alias's target is always stored.
//
// The sort compares addresses, but only the relations between tensors decide what the plan says, so
// equal states give equal plans wherever their memory lies. Nothing is remembered between saves.
//
// Cost: O(n log n) in the tensors. Rejected: comparing storages instead of ranges (two frameworks
// over one buffer have two storages), and aliases across groups (each group's files are complete
// without the others, for readers that know nothing of Strandline).

#include "staging/plan.h"

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <utility>

#include "base/checked_math.h"
#include "base/result_macros.h"
#include "format/names.h"
#include "format/safetensors.h"
#include "staging/check_views.h"

namespace strandline::staging {
namespace {

// What decides whether two tensors share bytes.
struct Source {
  std::uint32_t tensor = 0;
  const TensorView* view = nullptr;
  std::uint64_t bytes = 0;
  std::vector<std::int64_t> strides_bytes;  // 0 along dimensions of one element.

  [[nodiscard]] const std::byte* end() const { return view->data + bytes; }
  [[nodiscard]] auto device() const { return std::tie(view->device.kind, view->device.index); }
  // Equal for views that show the same elements of the same memory.
  [[nodiscard]] auto identity() const {
    return std::tie(view->device.kind, view->device.index, view->data, view->dtype, view->conjugate,
                    view->negative, view->shape, strides_bytes);
  }
};

struct Alias {
  std::uint32_t owner = 0;  // A tensor.
  std::uint64_t offset_bytes = 0;
};
using Aliases = std::vector<std::optional<Alias>>;  // One per tensor of the structure.

// Intervals that lie inside another one; what is left over goes to `rest`.
void find_sub_ranges(std::vector<Source> intervals, Aliases& aliases, std::vector<Source>& rest) {
  std::sort(intervals.begin(), intervals.end(), [](const Source& a, const Source& b) {
    if (a.device() != b.device()) return a.device() < b.device();
    if (a.view->data != b.view->data) return a.view->data < b.view->data;
    if (a.bytes != b.bytes) return a.bytes > b.bytes;
    return a.tensor < b.tensor;
  });
  const Source* furthest = nullptr;
  for (Source& source : intervals) {
    const bool inside = furthest != nullptr && furthest->device() == source.device() &&
                        source.end() <= furthest->end();
    if (!inside) {
      furthest = &source;
      continue;
    }
    const auto offset = static_cast<std::uint64_t>(source.view->data - furthest->view->data);
    const std::uint64_t element_bytes =
        std::max<std::uint64_t>(dtype_bits(source.view->dtype) / 8, 1);
    if (offset % element_bytes == 0) {
      aliases[source.tensor] = Alias{furthest->tensor, offset};
    } else {
      rest.push_back(std::move(source));
    }
  }
}

void find_equal_views(std::vector<Source>& sources, Aliases& aliases) {
  std::sort(sources.begin(), sources.end(), [](const Source& a, const Source& b) {
    if (a.identity() != b.identity()) return a.identity() < b.identity();
    return a.tensor < b.tensor;
  });
  const Source* first = nullptr;
  for (const Source& source : sources) {
    if (first != nullptr && first->identity() == source.identity()) {
      aliases[source.tensor] = Alias{first->tensor, 0};
    } else {
      first = &source;
    }
  }
}

void find_aliases(const StateDict& state, const std::vector<std::uint32_t>& tensors,
                  Aliases& aliases) {
  std::vector<Source> intervals;
  std::vector<Source> others;
  for (const std::uint32_t tensor : tensors) {
    const TensorView& view = state.tensors()[tensor];
    Source source{.tensor = tensor,
                  .view = &view,
                  .bytes = view.byte_count(),
                  .strides_bytes = view.strides_bytes};
    if (source.bytes == 0) continue;
    for (std::size_t i = 0; i < view.shape.size(); ++i) {
      if (view.shape[i] == 1) source.strides_bytes[i] = 0;
    }
    const bool plain = view.is_row_major() && !view.conjugate && !view.negative;
    (plain ? intervals : others).push_back(std::move(source));
  }
  find_sub_ranges(std::move(intervals), aliases, others);
  find_equal_views(others, aliases);
}

Error too_large(const std::string& group) {
  return Error{.code = ErrorCode::kInvalidArgument,
               .message = "the tensors of '" + group + "' together overflow 64 bits",
               .key_path = group};
}

// The file of one group, without its names.
Result<FilePlan> lay_out(const StateDict& state, const format::Grouping& grouping,
                         const format::Grouping::Group& group, const Aliases& aliases) {
  FilePlan file{.group = group.key,
                .name = format::shard_file_name(group.file_stem, 1, 1),
                .index_name = format::index_file_name(group.file_stem),
                .header = {},
                .tensors = {}};
  std::vector<std::uint32_t> stored;
  for (const std::uint32_t tensor : group.tensors) {
    if (!aliases[tensor]) stored.push_back(tensor);
  }
  const auto& declared = state.structure().tensors();
  std::stable_sort(stored.begin(), stored.end(), [&](std::uint32_t a, std::uint32_t b) {
    return dtype_bits(declared[a].dtype) > dtype_bits(declared[b].dtype);
  });
  std::vector<format::ShardTensor> entries;
  for (const std::uint32_t tensor : stored) {
    const std::uint64_t begin = file.data_bytes;
    const auto end = base::checked_add(begin, state.tensors()[tensor].byte_count());
    if (!end || *end > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      return failure(too_large(group.key));
    }
    file.tensors.push_back(
        {.tensor = tensor, .name = grouping.names[tensor], .offset = begin, .bytes = *end - begin});
    entries.push_back({.name = grouping.names[tensor],
                       .dtype = declared[tensor].dtype,
                       .shape = declared[tensor].shape,
                       .begin = begin,
                       .end = *end});
    file.data_bytes = *end;
  }
  file.header = format::write_safetensors_header(entries);
  if (file.header.size() > format::kSafetensorsHeaderBytesMax) {
    return failure(Error{.code = ErrorCode::kUnsupported,
                         .message = "the names of the tensors of '" + group.key + "' take " +
                                    std::to_string(file.header.size()) +
                                    " bytes, more than safetensors allows in one file: split the "
                                    "group or shorten its keys",
                         .key_path = group.key});
  }
  return file;
}

}  // namespace

std::uint64_t Plan::data_bytes() const {
  std::uint64_t bytes = 0;
  for (const FilePlan& file : files) bytes += file.data_bytes;
  return bytes;
}

std::uint64_t Plan::file_bytes() const {
  std::uint64_t bytes = 0;
  for (const FilePlan& file : files) bytes += file.file_bytes();
  return bytes;
}

Result<std::shared_ptr<const Plan>> plan_files(const StateDict& state) {
  STRANDLINE_RETURN_IF_ERROR(check_views(state, "save"));
  const format::Grouping grouping = format::group_tensors(state.structure());
  auto plan = std::make_shared<Plan>();
  plan->placements.resize(state.tensors().size());
  Aliases aliases(state.tensors().size());
  std::uint64_t total = 0;
  for (const format::Grouping::Group& group : grouping.groups) {
    find_aliases(state, group.tensors, aliases);
    STRANDLINE_ASSIGN_OR_RETURN(FilePlan file, lay_out(state, grouping, group, aliases));
    const auto sum = base::checked_add(total, file.file_bytes());
    if (!sum || *sum > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      return failure(too_large(group.key));
    }
    total = *sum;
    const auto number = static_cast<std::uint32_t>(plan->files.size());
    for (std::uint32_t i = 0; i < file.tensors.size(); ++i) {
      plan->placements[file.tensors[i].tensor] = {.file = number, .index = i, .alias_of = {}};
    }
    for (const std::uint32_t tensor : group.tensors) {
      if (!aliases[tensor]) continue;
      plan->placements[tensor] = {.file = number,
                                  .index = plan->placements[aliases[tensor]->owner].index,
                                  .alias_of = aliases[tensor]->owner,
                                  .alias_offset_bytes = aliases[tensor]->offset_bytes};
    }
    plan->files.push_back(std::move(file));
  }
  return std::shared_ptr<const Plan>(std::move(plan));
}

}  // namespace strandline::staging
