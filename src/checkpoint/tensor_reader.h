// Reads a range of a stored tensor's bytes, checked against its digests before anybody sees them.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "format/digest.h"
#include "strandline/storage.h"

namespace strandline::checkpoint {

// A stored tensor: where its bytes are and what they must be.
struct TensorSource {
  std::string file;
  std::uint64_t file_offset = 0;  // Of its first byte.
  std::uint64_t bytes = 0;
  const std::vector<format::Digest>* digests = nullptr;  // One per chunk.
};

// Reads [first, first + bytes) of the tensor in pieces and hands each, in order and only after its
// chunks' digests were checked, to `sink` (with its offset from `first`). An error of the sink
// ends the reading. Reads whole chunks, so a small range costs at most two more. `buffer` is
// scratch space, kept by the caller from call to call. Fails with kCorrupt on a wrong digest.
// Blocks.
[[nodiscard]] Status read_checked(
    ReadableDirectory& directory, const TensorSource& source, std::uint64_t first,
    std::uint64_t bytes, std::vector<std::byte>& buffer,
    const std::function<Status(std::uint64_t offset, std::span<const std::byte>)>& sink);

}  // namespace strandline::checkpoint
