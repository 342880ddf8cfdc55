// The index that lets Hugging Face tools open a group of a step as a model. Pure.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>

namespace strandline::format {

// {"metadata": {"total_size": …}, "weight_map": {tensor name: shard file, …}}. `weights` are pairs
// of tensor name and file. REQUIRES: names are valid UTF-8 and distinct.
[[nodiscard]] std::string write_index_file(
    std::uint64_t data_bytes, std::span<const std::pair<std::string, std::string>> weights);

}  // namespace strandline::format
