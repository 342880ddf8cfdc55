#include "checkpoint/tensor_reader.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/result_macros.h"

namespace strandline::checkpoint {
namespace {

using format::kDigestChunkBytes;

// A multiple of the digest's chunk: large enough for the disk, small enough for the cache.
constexpr std::uint64_t kReadBytes = 8 * kDigestChunkBytes;

Status check_chunks(const TensorSource& source, std::uint64_t first_chunk,
                    std::span<const std::byte> bytes) {
  for (std::uint64_t at = 0; at < bytes.size(); at += kDigestChunkBytes) {
    const std::uint64_t chunk = first_chunk + at / kDigestChunkBytes;
    const auto piece =
        bytes.subspan(at, std::min<std::uint64_t>(kDigestChunkBytes, bytes.size() - at));
    if (format::digest_of(piece) == (*source.digests)[chunk]) continue;
    return failure(
        ErrorCode::kCorrupt,
        fmt::format("bytes {} to {} of '{}' do not have the digest that they were written with",
                    source.file_offset + chunk * kDigestChunkBytes,
                    source.file_offset + chunk * kDigestChunkBytes + piece.size(), source.file));
  }
  return {};
}

}  // namespace

Status read_checked(
    ReadableDirectory& directory, const TensorSource& source, std::uint64_t first,
    std::uint64_t bytes, std::vector<std::byte>& buffer,
    const std::function<Status(std::uint64_t offset, std::span<const std::byte>)>& sink) {
  if (bytes == 0) return {};
  const std::uint64_t last = first + bytes;
  for (std::uint64_t at = first / kDigestChunkBytes * kDigestChunkBytes; at < last;
       at += kReadBytes) {
    // Whole chunks, up to the end of the range or of the tensor.
    const std::uint64_t chunks = format::digest_chunk_count(std::min(last - at, kReadBytes));
    const std::uint64_t end = std::min(at + chunks * kDigestChunkBytes, source.bytes);
    if (buffer.size() < end - at) buffer.resize(end - at);
    const std::span<std::byte> piece(buffer.data(), end - at);
    STRANDLINE_RETURN_IF_ERROR(directory.read_at(source.file, source.file_offset + at, piece));
    STRANDLINE_RETURN_IF_ERROR(check_chunks(source, at / kDigestChunkBytes, piece));
    const std::uint64_t from = std::max(at, first);
    const std::uint64_t to = std::min(end, last);
    STRANDLINE_RETURN_IF_ERROR(
        sink(from - first, std::span<const std::byte>(piece).subspan(from - at, to - from)));
  }
  return {};
}

}  // namespace strandline::checkpoint
