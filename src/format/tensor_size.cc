#include "format/tensor_size.h"

#include <algorithm>

#include "base/checked_math.h"

namespace strandline::format {

std::optional<std::uint64_t> tensor_bytes(DType dtype, std::span<const std::uint64_t> shape) {
  if (std::find(shape.begin(), shape.end(), 0u) != shape.end()) return 0;
  // Counting bits from the start keeps one check for all types; the sizes that this loses, beyond
  // 2^61 bytes, no file has.
  std::uint64_t bits = dtype_bits(dtype);
  for (const std::uint64_t extent : shape) {
    const auto product = base::checked_mul(bits, extent);
    if (!product) return std::nullopt;
    bits = *product;
  }
  if (bits % 8 != 0) return std::nullopt;
  return bits / 8;
}

}  // namespace strandline::format
