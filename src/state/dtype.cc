#include "strandline/dtype.h"

#include <algorithm>
#include <array>

namespace strandline::inline v0 {
namespace {

struct Entry {
  std::string_view name;
  std::uint32_t bits;
};

// In the order of DType.
constexpr std::array<Entry, kDTypeCount> kTable{{
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
}};
static_assert(static_cast<std::size_t>(DType::kU64) + 1 == kTable.size());

}  // namespace

std::string_view dtype_name(DType dtype) { return kTable.at(static_cast<std::size_t>(dtype)).name; }

std::uint32_t dtype_bits(DType dtype) { return kTable.at(static_cast<std::size_t>(dtype)).bits; }

std::optional<DType> dtype_from_name(std::string_view name) {
  const auto* found = std::find_if(kTable.begin(), kTable.end(),
                                   [name](const Entry& entry) { return entry.name == name; });
  if (found == kTable.end()) return std::nullopt;
  return static_cast<DType>(found - kTable.begin());
}

}  // namespace strandline::inline v0
