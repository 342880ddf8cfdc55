// XXH3-128 digests (seed 0) of checkpoint bytes. They find damage, not forgery.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace strandline::format {

// A tensor's row-major bytes are digested in chunks of this size, so that a slice of a tensor can
// be checked by reading kilobytes. Part of the format.
inline constexpr std::uint64_t kDigestChunkBytes = std::uint64_t{256} * 1024;

struct Digest {
  std::uint64_t high = 0;
  std::uint64_t low = 0;
  bool operator==(const Digest&) const = default;

  // 32 lower-case hexadecimal digits, the high half first; and back (lower case only).
  [[nodiscard]] std::string hex() const;
  [[nodiscard]] static std::optional<Digest> from_hex(std::string_view hex);
};

[[nodiscard]] Digest digest_of(std::span<const std::byte> bytes);
[[nodiscard]] Digest digest_of(std::string_view bytes);

// The digest of bytes that come piece by piece. Thread-safety: single-threaded.
class DigestStream {
 public:
  DigestStream();
  ~DigestStream();
  DigestStream(DigestStream&&) noexcept;
  DigestStream& operator=(DigestStream&&) noexcept;
  void reset();
  void update(std::span<const std::byte> bytes);
  [[nodiscard]] Digest finish() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The number of digests that `bytes` bytes of a tensor have.
[[nodiscard]] constexpr std::uint64_t digest_chunk_count(std::uint64_t bytes) {
  return bytes / kDigestChunkBytes + (bytes % kDigestChunkBytes != 0 ? 1 : 0);
}

}  // namespace strandline::format
