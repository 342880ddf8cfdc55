// Gathers strided tensors into row-major bytes, and scatters them back.
//
// Problem. A view's elements lie anywhere in its storage (transposed, every second, reversed,
// expanded), and torch's lazy `conj()` and `neg()` views say that the values differ from the bytes.
// Files hold plain row-major values. A copy may be asked for any range of these bytes, so that
// chunks of one tensor are copied by several threads; a range may begin and end inside an element.
//
// Approach. Dimensions of one element are dropped and neighbours that continue each other are
// merged, so most views become one or two dimensions. What remains is a number of rows: runs along
// the innermost dimension. An odometer over the outer dimensions finds each row; the row is one
// memcpy where it is contiguous and its values are its bytes, otherwise a loop over elements of a
// fixed size that the compiler can unroll. Elements cut by the range's ends go through a small
// buffer. One walk serves both directions: only which side is written differs.
//
// Values. Negating a float flips its sign bit, whatever the number is (NaN included), and
// conjugating a complex number flips the sign of its imaginary half: both are an XOR by a mask. The
// FNUZ floats have one zero and one NaN, and their NaN is what a negative zero would be: both stay
// as they are. Integers are negated in two's complement. Each is its own inverse, so restoring into
// a conj or neg view applies the same.
//
// Concurrency. None: no state. Rejected: recursion over dimensions (a range that begins in the
// middle needs all indexes anyway), and a general table of element functions (not inlined).

#include "device/host_device.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

namespace strandline::device {
namespace {

enum class Direction { kGather, kScatter };

// How values come from bytes, and bytes from values.
struct Transform {
  enum class Kind { kNone, kXor, kFnuz, kInteger };
  Kind kind = Kind::kNone;
  std::uint64_t mask = 0;  // Of an element, for kXor.
};

struct Dimension {
  std::uint64_t extent = 1;
  std::int64_t stride_bytes = 0;
};

// The rows of a view: everything but the innermost dimension is `outer`.
struct Geometry {
  std::uint64_t element_bytes = 1;
  std::vector<Dimension> outer;
  Dimension row;
};

tl::unexpected<Error> unsupported_negative(DType dtype) {
  return failure(ErrorCode::kUnsupported, "a negative view of type " +
                                              std::string(dtype_name(dtype)) +
                                              " has no meaning: resolve it before saving");
}

Result<Transform> transform_of(const TensorView& view) {
  using Kind = Transform::Kind;
  constexpr std::uint64_t kTopBit = 1ull << 63;
  constexpr std::uint64_t kBothHalves = kTopBit | 1ull << 31;
  if (view.dtype == DType::kC64) {
    const std::uint64_t mask = (view.conjugate ? kTopBit : 0) ^ (view.negative ? kBothHalves : 0);
    return Transform{mask == 0 ? Kind::kNone : Kind::kXor, mask};
  }
  if (!view.negative) return Transform{};  // The conjugate of a real number is the number.
  switch (view.dtype) {
    case DType::kBool:
    case DType::kF4:
    case DType::kF6E2M3:
    case DType::kF6E3M2:
    case DType::kF8E8M0:
      return unsupported_negative(view.dtype);
    case DType::kF8E5M2:
    case DType::kF8E4M3:
    case DType::kF16:
    case DType::kBF16:
    case DType::kF32:
    case DType::kF64:
      return Transform{Kind::kXor, 1ull << (dtype_bits(view.dtype) - 1)};
    case DType::kF8E4M3FNUZ:
    case DType::kF8E5M2FNUZ:
      return Transform{Kind::kFnuz, 0};
    case DType::kU8:
    case DType::kI8:
    case DType::kI16:
    case DType::kU16:
    case DType::kI32:
    case DType::kU32:
    case DType::kI64:
    case DType::kU64:
      return Transform{Kind::kInteger, 0};
    case DType::kC64:
      break;  // Above.
  }
  return unsupported_negative(view.dtype);
}

template <typename Element>
Element transformed(Element element, Transform transform) {
  switch (transform.kind) {
    case Transform::Kind::kNone:
      return element;
    case Transform::Kind::kXor:
      return static_cast<Element>(element ^ static_cast<Element>(transform.mask));
    case Transform::Kind::kFnuz:
      return static_cast<Element>((element & 0x7f) == 0 ? element : element ^ 0x80);
    case Transform::Kind::kInteger:
      return static_cast<Element>(Element{0} - element);
  }
  return element;
}

// Dimensions that are walked like one become one.
Geometry geometry_of(const TensorView& view) {
  Geometry geometry;
  geometry.element_bytes = dtype_bits(view.dtype) / 8;
  std::vector<Dimension> dimensions;
  for (std::size_t i = 0; i < view.shape.size(); ++i) {
    const Dimension inner{view.shape[i], view.strides_bytes[i]};
    if (inner.extent == 1) continue;
    if (!dimensions.empty() && dimensions.back().stride_bytes ==
                                   static_cast<std::int64_t>(inner.extent) * inner.stride_bytes) {
      dimensions.back() = {dimensions.back().extent * inner.extent, inner.stride_bytes};
    } else {
      dimensions.push_back(inner);
    }
  }
  if (dimensions.empty()) {
    geometry.row = {1, static_cast<std::int64_t>(geometry.element_bytes)};
    return geometry;
  }
  geometry.row = dimensions.back();
  dimensions.pop_back();
  geometry.outer = std::move(dimensions);
  return geometry;
}

// The place of the row that the odometer stands at.
class RowCursor {
 public:
  RowCursor(const Geometry& geometry, std::byte* data, std::uint64_t row)
      : outer_(geometry.outer), index_(geometry.outer.size(), 0), at_(data) {
    for (std::size_t i = outer_.size(); i-- > 0;) {
      index_[i] = row % outer_[i].extent;
      row /= outer_[i].extent;
      at_ += static_cast<std::int64_t>(index_[i]) * outer_[i].stride_bytes;
    }
  }

  [[nodiscard]] std::byte* at() const { return at_; }

  void advance() {
    for (std::size_t i = outer_.size(); i-- > 0;) {
      at_ += outer_[i].stride_bytes;
      if (++index_[i] < outer_[i].extent) return;
      at_ -= static_cast<std::int64_t>(outer_[i].extent) * outer_[i].stride_bytes;
      index_[i] = 0;
    }
  }

 private:
  const std::vector<Dimension>& outer_;
  std::vector<std::uint64_t> index_;
  std::byte* at_;
};

// Whole elements between a strided row and packed host memory.
template <typename Element, Direction kDirection>
void copy_elements(std::byte* strided, std::int64_t stride_bytes, std::byte* packed,
                   std::uint64_t count, Transform transform) {
  for (std::uint64_t i = 0; i < count; ++i) {
    std::byte* const from = kDirection == Direction::kGather ? strided : packed;
    std::byte* const to = kDirection == Direction::kGather ? packed : strided;
    Element element;
    std::memcpy(&element, from, sizeof element);
    element = transformed(element, transform);
    std::memcpy(to, &element, sizeof element);
    strided += stride_bytes;
    packed += sizeof(Element);
  }
}

// Some bytes of one element.
template <typename Element, Direction kDirection>
void copy_part(std::byte* strided, std::byte* packed, std::uint64_t skip_bytes, std::uint64_t bytes,
               Transform transform) {
  if (transform.kind == Transform::Kind::kNone) {
    std::byte* const from = kDirection == Direction::kGather ? strided + skip_bytes : packed;
    std::byte* const to = kDirection == Direction::kGather ? packed : strided + skip_bytes;
    std::memcpy(to, from, bytes);
    return;
  }
  // Negation carries from byte to byte, so the whole element is resolved. Scattering keeps the
  // values of its other bytes.
  std::byte value[sizeof(Element)];
  Element element;
  std::memcpy(&element, strided, sizeof element);
  element = transformed(element, transform);
  std::memcpy(value, &element, sizeof element);
  if (kDirection == Direction::kGather) {
    std::memcpy(packed, value + skip_bytes, bytes);
    return;
  }
  std::memcpy(value + skip_bytes, packed, bytes);
  std::memcpy(&element, value, sizeof element);
  element = transformed(element, transform);
  std::memcpy(strided, &element, sizeof element);
}

// Bytes [first, first + bytes) of one row.
template <typename Element, Direction kDirection>
void copy_row(std::byte* row, std::int64_t stride_bytes, std::byte* packed, std::uint64_t first,
              std::uint64_t bytes, Transform transform) {
  constexpr std::uint64_t kSize = sizeof(Element);
  if (transform.kind == Transform::Kind::kNone &&
      stride_bytes == static_cast<std::int64_t>(kSize)) {
    std::byte* const from = kDirection == Direction::kGather ? row + first : packed;
    std::byte* const to = kDirection == Direction::kGather ? packed : row + first;
    std::memcpy(to, from, bytes);
    return;
  }
  std::byte* at = row + static_cast<std::int64_t>(first / kSize) * stride_bytes;
  if (const std::uint64_t skip = first % kSize; skip != 0) {
    const std::uint64_t part = std::min(kSize - skip, bytes);
    copy_part<Element, kDirection>(at, packed, skip, part, transform);
    at += stride_bytes;
    packed += part;
    bytes -= part;
  }
  const std::uint64_t whole = bytes / kSize;
  copy_elements<Element, kDirection>(at, stride_bytes, packed, whole, transform);
  if (const std::uint64_t rest = bytes % kSize; rest != 0) {
    copy_part<Element, kDirection>(at + static_cast<std::int64_t>(whole) * stride_bytes,
                                   packed + whole * kSize, 0, rest, transform);
  }
}

template <typename Element, Direction kDirection>
void copy_range(const Geometry& geometry, std::byte* data, std::uint64_t first, std::byte* packed,
                std::uint64_t bytes, Transform transform) {
  const std::uint64_t row_bytes = geometry.row.extent * sizeof(Element);
  RowCursor cursor(geometry, data, first / row_bytes);
  std::uint64_t skip = first % row_bytes;
  while (bytes > 0) {
    const std::uint64_t part = std::min(row_bytes - skip, bytes);
    copy_row<Element, kDirection>(cursor.at(), geometry.row.stride_bytes, packed, skip, part,
                                  transform);
    packed += part;
    bytes -= part;
    skip = 0;
    cursor.advance();
  }
}

// `packed` is only read when scattering.
template <Direction kDirection>
Status copy(const TensorView& view, std::uint64_t first, std::byte* packed, std::uint64_t bytes) {
  const std::uint64_t total = view.byte_count();
  if (first > total || bytes > total - first) {
    return failure(ErrorCode::kInvalidArgument,
                   "bytes " + std::to_string(first) + " to " + std::to_string(first + bytes) +
                       " are not inside the tensor's " + std::to_string(total) + " bytes");
  }
  const Result<Transform> transform = transform_of(view);
  if (!transform) return failure(transform.error());
  if (bytes == 0) return {};
  if (view.is_row_major() && transform->kind == Transform::Kind::kNone) {
    std::byte* const from = kDirection == Direction::kGather ? view.data + first : packed;
    std::byte* const to = kDirection == Direction::kGather ? packed : view.data + first;
    std::memcpy(to, from, bytes);
    return {};
  }
  if (dtype_bits(view.dtype) % 8 != 0) {
    return failure(
        ErrorCode::kUnsupported,
        "a tensor of packed type " + std::string(dtype_name(view.dtype)) + " must be contiguous");
  }
  const Geometry geometry = geometry_of(view);
  switch (geometry.element_bytes) {
    case 1:
      copy_range<std::uint8_t, kDirection>(geometry, view.data, first, packed, bytes, *transform);
      break;
    case 2:
      copy_range<std::uint16_t, kDirection>(geometry, view.data, first, packed, bytes, *transform);
      break;
    case 4:
      copy_range<std::uint32_t, kDirection>(geometry, view.data, first, packed, bytes, *transform);
      break;
    default:
      copy_range<std::uint64_t, kDirection>(geometry, view.data, first, packed, bytes, *transform);
      break;
  }
  return {};
}

Status check_destination(const TensorView& view) {
  if (!view.writable) {
    return failure(ErrorCode::kInvalidArgument,
                   "the destination tensor is read-only: restore into a writable one");
  }
  if (view.element_count() == 0) return {};
  for (std::size_t i = 0; i < view.shape.size(); ++i) {
    if (view.shape[i] > 1 && view.strides_bytes[i] == 0 && dtype_bits(view.dtype) % 8 == 0) {
      return failure(ErrorCode::kInvalidArgument,
                     "the destination tensor is expanded: several of its elements share one "
                     "place; restore into a tensor of its own memory");
    }
  }
  return {};
}

}  // namespace

void HostDevice::copy_to_host_async(const TensorView& source, std::uint64_t first_byte,
                                    std::span<std::byte> host, Completion done) {
  done(copy<Direction::kGather>(source, first_byte, host.data(), host.size()));
}

void HostDevice::copy_from_host_async(std::span<const std::byte> host,
                                      const TensorView& destination, std::uint64_t first_byte,
                                      Completion done) {
  Status status = check_destination(destination);
  if (status) {
    status = copy<Direction::kScatter>(destination, first_byte, const_cast<std::byte*>(host.data()),
                                       host.size());
  }
  done(std::move(status));
}

}  // namespace strandline::device
