/// @file
/// Element types, named as the safetensors format names them.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "strandline/export.h"

namespace strandline::inline v0 {

/// Every element type that safetensors knows. Types of fewer than 8 bits are packed.
enum class DType : std::uint8_t {
  kBool,
  kF4,
  kF6E2M3,
  kF6E3M2,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kF8E8M0,
  kF8E4M3FNUZ,
  kF8E5M2FNUZ,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kC64,
  kF64,
  kI64,
  kU64,
};

/// The number of element types; every value below it cast to DType is valid.
inline constexpr std::uint8_t kDTypeCount = 22;

/// The name in files, such as "BF16".
STRANDLINE_EXPORT std::string_view dtype_name(DType dtype);

/// The type of a name in files; nothing if safetensors has no such type.
STRANDLINE_EXPORT std::optional<DType> dtype_from_name(std::string_view name);

/// The size of an element in bits: 4, 6, 8, 16, 32 or 64.
STRANDLINE_EXPORT std::uint32_t dtype_bits(DType dtype);

}  // namespace strandline::inline v0
