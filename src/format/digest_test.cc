#include "format/digest.h"

#include <gtest/gtest.h>

#include <string>

namespace strandline::format {
namespace {

TEST(Digest, IsXxh3With128BitsAndSeedZero) {
  // The values of `xxh128sum`, which prints the high half first.
  EXPECT_EQ(digest_of(std::string_view()).hex(), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(digest_of(std::string_view("strandline")).hex(), "04c1e57eb1d5e65b9a08d3556ab156f1");
  EXPECT_EQ(digest_of(std::string(1000, 'a')).hex(), "b01da365eddaa29cb3e7af627147db7c");
}

TEST(Digest, HexRoundTripsAndNothingElseIsHex) {
  const Digest digest{.high = 0x00000000000000a1, .low = 0xfedcba9876543210};
  EXPECT_EQ(digest.hex(), "00000000000000a1fedcba9876543210");
  EXPECT_EQ(Digest::from_hex(digest.hex()), digest);
  EXPECT_FALSE(Digest::from_hex(""));
  EXPECT_FALSE(Digest::from_hex("00000000000000a1fedcba987654321"));
  EXPECT_FALSE(Digest::from_hex("00000000000000a1fedcba98765432100"));
  EXPECT_FALSE(Digest::from_hex("00000000000000A1fedcba9876543210"));
  EXPECT_FALSE(Digest::from_hex("00000000000000g1fedcba9876543210"));
  EXPECT_FALSE(Digest::from_hex("+0000000000000a1fedcba9876543210"));
}

TEST(DigestStream, PiecesOfAnySizeGiveTheDigestOfTheWhole) {
  std::string data(10'000, '\0');
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<char>(i * 31 % 251);
  const std::span<const std::byte> bytes = std::as_bytes(std::span(data));
  DigestStream stream;
  for (const std::size_t piece : {1u, 7u, 64u, 240u, 241u, 1024u, 9'999u}) {
    stream.reset();
    for (std::size_t done = 0; done < bytes.size(); done += piece) {
      stream.update(bytes.subspan(done, std::min(piece, bytes.size() - done)));
    }
    EXPECT_EQ(stream.finish(), digest_of(bytes)) << piece;
  }
}

TEST(DigestStream, FinishMayBeAskedInBetween) {
  DigestStream stream;
  EXPECT_EQ(stream.finish(), digest_of(std::string_view()));
  const std::string_view text = "strandline";
  stream.update(std::as_bytes(std::span(text.substr(0, 6))));
  EXPECT_EQ(stream.finish(), digest_of(text.substr(0, 6)));
  stream.update(std::as_bytes(std::span(text.substr(6))));
  EXPECT_EQ(stream.finish(), digest_of(text));
}

TEST(Digest, ChunksCoverEveryByte) {
  EXPECT_EQ(digest_chunk_count(0), 0u);
  EXPECT_EQ(digest_chunk_count(1), 1u);
  EXPECT_EQ(digest_chunk_count(kDigestChunkBytes), 1u);
  EXPECT_EQ(digest_chunk_count(kDigestChunkBytes + 1), 2u);
  EXPECT_EQ(digest_chunk_count(~0ull), 1ull << 46);
}

}  // namespace
}  // namespace strandline::format
