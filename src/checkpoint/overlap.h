// Finds saved values that would overwrite each other in the destination.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "strandline/checkpoint.h"
#include "strandline/error.h"

namespace strandline::checkpoint {

// Where destinations of `reads` share memory (tied weights, views of one storage), checks that what
// was saved for them agrees on every shared byte; fails with kMismatch naming both otherwise. Reads
// tensor data only where places and digests do not settle it. Changes nothing. Blocks.
[[nodiscard]] Status check_overlaps(const Checkpoint& checkpoint, const StateDict& destination,
                                    std::span<const TensorRead> reads,
                                    std::span<const std::uint32_t> destination_tensors);

}  // namespace strandline::checkpoint
