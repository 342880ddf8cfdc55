// Geometry of tensor views: sizes, reach, and whether all of it is inside the storage.

#include <limits>

#include "base/checked_math.h"
#include "strandline/state_dict.h"

namespace strandline::inline v0 {
namespace {

// The product of a shape, or nothing if it does not fit into 64 bits. Zero extents win, whatever
// the other extents are.
std::optional<std::uint64_t> checked_element_count(const std::vector<std::uint64_t>& shape) {
  for (const std::uint64_t extent : shape) {
    if (extent == 0) return 0;
  }
  std::uint64_t count = 1;
  for (const std::uint64_t extent : shape) {
    const auto product = base::checked_mul(count, extent);
    if (!product) return std::nullopt;
    count = *product;
  }
  return count;
}

// [first, second) bytes relative to the first element, or nothing on overflow.
std::optional<std::pair<std::int64_t, std::int64_t>> checked_reach(const TensorView& view,
                                                                   std::uint64_t element_bytes) {
  std::int64_t low = 0;
  std::int64_t high = 0;
  for (std::size_t i = 0; i < view.shape.size(); ++i) {
    if (view.shape[i] > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      return std::nullopt;
    }
    const auto last = static_cast<std::int64_t>(view.shape[i]) - 1;
    std::int64_t distance = 0;
    if (__builtin_mul_overflow(last, view.strides_bytes[i], &distance)) return std::nullopt;
    std::int64_t& end = distance < 0 ? low : high;
    if (__builtin_add_overflow(end, distance, &end)) return std::nullopt;
  }
  if (__builtin_add_overflow(high, static_cast<std::int64_t>(element_bytes), &high)) {
    return std::nullopt;
  }
  return std::pair{low, high};
}

Status outside_storage(const TensorView& view, std::int64_t from, std::int64_t to) {
  return failure(
      ErrorCode::kInvalidArgument,
      "the tensor reaches bytes " + std::to_string(from) + " to " + std::to_string(to) +
          " of its storage, which holds " + std::to_string(view.storage_bytes) +
          " bytes: the storage was freed or resized after the tensor was made; drop the tensor "
          "from the state or make it again");
}

Status check_reach(const TensorView& view) {
  const std::uint64_t bits = dtype_bits(view.dtype);
  std::pair<std::int64_t, std::int64_t> reach{0, 0};
  if (bits % 8 != 0) {
    if (!view.is_row_major()) {
      return failure(ErrorCode::kUnsupported, "a tensor of packed type " +
                                                  std::string(dtype_name(view.dtype)) +
                                                  " must be contiguous: make it so before saving");
    }
    reach.second = static_cast<std::int64_t>(view.byte_count());
  } else {
    const auto checked = checked_reach(view, bits / 8);
    if (!checked) return failure(ErrorCode::kInvalidArgument, "the tensor's strides overflow");
    reach = *checked;
  }
  if (view.data == nullptr || view.storage_base == nullptr) {
    return outside_storage(view, reach.first, reach.second);
  }
  const std::int64_t offset = view.data - view.storage_base;
  const std::int64_t from = offset + reach.first;
  const std::int64_t to = offset + reach.second;
  if (from < 0 || static_cast<std::uint64_t>(to) > view.storage_bytes) {
    return outside_storage(view, from, to);
  }
  return {};
}

}  // namespace

std::uint64_t TensorView::element_count() const { return checked_element_count(shape).value_or(0); }

std::uint64_t TensorView::byte_count() const {
  const std::uint64_t bits = dtype_bits(dtype);
  const std::uint64_t count = element_count();
  return bits % 8 == 0 ? count * (bits / 8) : count / 8 * bits + count % 8 * bits / 8;
}

bool TensorView::is_row_major() const {
  const std::uint64_t bits = dtype_bits(dtype);
  if (element_count() == 0) return true;
  std::uint64_t expected_bits = bits;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (shape[i] == 1) continue;
    if (expected_bits % 8 != 0) {
      // Packed: neighbours share bytes, so the innermost stride says nothing.
      expected_bits *= shape[i];
      continue;
    }
    if (strides_bytes[i] != static_cast<std::int64_t>(expected_bits / 8)) return false;
    expected_bits *= shape[i];
  }
  return true;
}

std::pair<std::int64_t, std::int64_t> TensorView::reach_bytes() const {
  if (element_count() == 0) return {0, 0};
  if (dtype_bits(dtype) % 8 != 0) return {0, static_cast<std::int64_t>(byte_count())};
  return checked_reach(*this, dtype_bits(dtype) / 8)
      .value_or(std::pair<std::int64_t, std::int64_t>{});
}

Status TensorView::check() const {
  if (strides_bytes.size() != shape.size()) {
    return failure(ErrorCode::kInvalidArgument,
                   "the tensor has " + std::to_string(shape.size()) + " dimensions but " +
                       std::to_string(strides_bytes.size()) + " strides");
  }
  const auto count = checked_element_count(shape);
  const std::uint64_t bits = dtype_bits(dtype);
  // 2^62 bytes are far beyond any memory and leave room for sums of sizes.
  constexpr std::uint64_t kTensorBytesMax = 1ull << 62;
  const auto total_bits = count ? base::checked_mul(*count, bits) : std::nullopt;
  if (!total_bits || *total_bits / 8 > kTensorBytesMax) {
    return failure(ErrorCode::kInvalidArgument, "the tensor's size overflows");
  }
  if (*total_bits % 8 != 0) {
    return failure(ErrorCode::kUnsupported, "a tensor of packed type " +
                                                std::string(dtype_name(dtype)) +
                                                " must fill whole bytes: give it another shape");
  }
  if (*count == 0) return {};
  return check_reach(*this);
}

TensorView TensorView::row_major(void* data, DType dtype, std::vector<std::uint64_t> shape) {
  TensorView view;
  view.data = static_cast<std::byte*>(data);
  view.dtype = dtype;
  view.shape = std::move(shape);
  view.strides_bytes.resize(view.shape.size());
  std::uint64_t stride_bits = dtype_bits(dtype);
  for (std::size_t i = view.shape.size(); i-- > 0;) {
    view.strides_bytes[i] = static_cast<std::int64_t>(stride_bits / 8);
    stride_bits *= view.shape[i];
  }
  view.storage_base = view.data;
  view.storage_bytes = view.byte_count();
  view.writable = true;
  return view;
}

}  // namespace strandline::inline v0
