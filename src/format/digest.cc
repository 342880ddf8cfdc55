#include "format/digest.h"

#include <fmt/format.h>

// The whole of xxHash is inlined here, so that no symbol of it leaves the library and none is
// needed from the system at run time.
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace strandline::format {
namespace {

constexpr std::size_t kHexDigits = 32;

std::optional<std::uint64_t> half_from_hex(std::string_view digits) {
  std::uint64_t value = 0;
  for (const char digit : digits) {
    value <<= 4;
    if (digit >= '0' && digit <= '9') {
      value |= static_cast<std::uint64_t>(digit - '0');
    } else if (digit >= 'a' && digit <= 'f') {
      value |= static_cast<std::uint64_t>(digit - 'a' + 10);
    } else {
      return std::nullopt;
    }
  }
  return value;
}

Digest from_xxhash(XXH128_hash_t hash) { return {.high = hash.high64, .low = hash.low64}; }

}  // namespace

std::string Digest::hex() const { return fmt::format("{:016x}{:016x}", high, low); }

std::optional<Digest> Digest::from_hex(std::string_view hex) {
  if (hex.size() != kHexDigits) return std::nullopt;
  const auto high = half_from_hex(hex.substr(0, kHexDigits / 2));
  const auto low = half_from_hex(hex.substr(kHexDigits / 2));
  if (!high || !low) return std::nullopt;
  return Digest{.high = *high, .low = *low};
}

Digest digest_of(std::span<const std::byte> bytes) {
  return from_xxhash(XXH3_128bits(bytes.data(), bytes.size()));
}

Digest digest_of(std::string_view bytes) {
  return from_xxhash(XXH3_128bits(bytes.data(), bytes.size()));
}

struct DigestStream::State {
  XXH3_state_t xxhash;
};

DigestStream::DigestStream() : state_(std::make_unique<State>()) { reset(); }
DigestStream::~DigestStream() = default;
DigestStream::DigestStream(DigestStream&&) noexcept = default;
DigestStream& DigestStream::operator=(DigestStream&&) noexcept = default;

void DigestStream::reset() { XXH3_128bits_reset(&state_->xxhash); }

void DigestStream::update(std::span<const std::byte> bytes) {
  XXH3_128bits_update(&state_->xxhash, bytes.data(), bytes.size());
}

Digest DigestStream::finish() const { return from_xxhash(XXH3_128bits_digest(&state_->xxhash)); }

}  // namespace strandline::format
