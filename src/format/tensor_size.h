// How many bytes a tensor takes, in arithmetic that hostile shapes cannot fool.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "strandline/dtype.h"

namespace strandline::format {

// The bytes of a tensor in row-major order. Nothing if the size in bits does not fit into 64 bits,
// or if packed elements do not fill whole bytes. A zero extent makes a tensor empty, whatever the
// others.
[[nodiscard]] std::optional<std::uint64_t> tensor_bytes(DType dtype,
                                                        std::span<const std::uint64_t> shape);

}  // namespace strandline::format
