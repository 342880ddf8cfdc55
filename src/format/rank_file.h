// The rank file, version 1: the chunk digests of what one rank wrote. Pure: no I/O.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "format/digest.h"
#include "strandline/error.h"

namespace strandline::format {

// 256 MiB hold the digests of 2 TiB of tensors; a larger file is not one of ours.
inline constexpr std::uint64_t kRankFileBytesMax = 256ull << 20;

struct RankFile {
  struct Tensor {
    std::string name;  // In the shard.
    std::uint64_t bytes = 0;
    std::vector<Digest> digests;  // digest_chunk_count(bytes) of them.
  };
  struct Shard {
    std::string name;
    std::vector<Tensor> tensors;  // In the order of their bytes.
  };
  std::string run;
  std::int64_t step = 0;
  std::uint32_t rank = 0;
  std::vector<Shard> shards;
};

[[nodiscard]] std::string write_rank_file(const RankFile& file);

// Fails with kCorrupt (damaged, hostile, or not a rank file) or kUnsupported (a newer major
// version). Pure, bounded, safe on any input. The digest of the file itself is in the manifest.
[[nodiscard]] Result<RankFile> parse_rank_file(std::string_view text);

}  // namespace strandline::format
