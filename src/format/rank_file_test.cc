#include "format/rank_file.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <string>

namespace strandline::format {
namespace {

RankFile example() {
  RankFile file;
  file.run = "0123456789abcdef0123456789abcdef";
  file.step = 1200;
  file.rank = 3;
  file.shards = {{.name = "model-00001-of-00001.safetensors",
                  .tensors = {{.name = "big \"one\"",
                               .bytes = kDigestChunkBytes + 1,
                               .digests = {digest_of(std::string_view("a")),
                                           digest_of(std::string_view("b"))}},
                              {.name = "", .bytes = 0, .digests = {}}}},
                 {.name = "optimizer-00001-of-00001.safetensors", .tensors = {}}};
  return file;
}

testing::AssertionResult refused(std::string_view text, std::string_view reason = "",
                                 ErrorCode code = ErrorCode::kCorrupt) {
  const auto file = parse_rank_file(text);
  if (file) return testing::AssertionFailure() << "accepted: " << text;
  if (file.error().code != code || file.error().message.find(reason) == std::string::npos) {
    return testing::AssertionFailure() << file.error().message;
  }
  return testing::AssertionSuccess();
}

std::string edited(std::string_view from, std::string_view to) {
  std::string text = write_rank_file(example());
  const std::size_t position = text.find(from);
  if (position == std::string::npos) {
    ADD_FAILURE() << "not there: " << from;
    return {};
  }
  return text.replace(position, from.size(), to);
}

TEST(RankFile, RoundTrips) {
  const RankFile file = example();
  const std::string text = write_rank_file(file);
  EXPECT_TRUE(text.ends_with("}\n"));
  const auto parsed = parse_rank_file(text);
  ASSERT_TRUE(parsed) << parsed.error().message;
  EXPECT_EQ(parsed->run, file.run);
  EXPECT_EQ(parsed->step, file.step);
  EXPECT_EQ(parsed->rank, file.rank);
  ASSERT_EQ(parsed->shards.size(), 2u);
  EXPECT_EQ(parsed->shards[0].name, file.shards[0].name);
  ASSERT_EQ(parsed->shards[0].tensors.size(), 2u);
  EXPECT_EQ(parsed->shards[0].tensors[0].name, "big \"one\"");
  EXPECT_EQ(parsed->shards[0].tensors[0].bytes, kDigestChunkBytes + 1);
  EXPECT_EQ(parsed->shards[0].tensors[0].digests, file.shards[0].tensors[0].digests);
  EXPECT_TRUE(parsed->shards[0].tensors[1].digests.empty());
  EXPECT_TRUE(parsed->shards[1].tensors.empty());
  EXPECT_EQ(write_rank_file(*parsed), text);
}

// If this fails, the format has changed; see the same test of the manifest.
TEST(RankFile, TheBytesOfVersion1StayWhatTheyAre) {
  RankFile file = example();
  file.shards.pop_back();
  EXPECT_EQ(
      write_rank_file(file),
      R"({"format":{"major":1,"minor":0,"requires":[]},"run":"0123456789abcdef0123456789abcdef",)"
      R"("step":1200,"rank":3,"shards":[{"name":"model-00001-of-00001.safetensors","tensors":[)"
      R"({"name":"big \"one\"","bytes":262145,"digests":")"
      "a96faf705af16834e6c632b61e964e1f"
      "4b2212e31ac97fd4575a0b1c44d8843f"
      R"("},{"name":"","bytes":0,"digests":""}]}]})"
      "\n");
}

TEST(RankFile, TheExampleInTheDocumentationParses) {
  std::ifstream stream(std::string(STRANDLINE_SOURCE_DIR) + "/docs/format.md");
  const std::string page{std::istreambuf_iterator<char>(stream), {}};
  const std::string_view fence = "```json rank-00000.json\n";
  const std::size_t begin = page.find(fence);
  ASSERT_NE(begin, std::string::npos);
  const std::size_t end = page.find("```\n", begin + fence.size());
  const auto file = parse_rank_file(page.substr(begin + fence.size(), end - begin - fence.size()));
  ASSERT_TRUE(file) << file.error().message;
  EXPECT_EQ(file->shards.front().tensors.front().digests.size(), 1u);
}

TEST(RankFile, EveryTruncationIsRefused) {
  const std::string text = write_rank_file(example());
  for (std::size_t size = 0; size + 1 < text.size(); ++size) {
    EXPECT_TRUE(refused(text.substr(0, size))) << size;
  }
  EXPECT_TRUE(refused(text + text));
}

TEST(RankFile, DigestsMustBeThoseOfTheBytes) {
  EXPECT_TRUE(refused(edited(R"("bytes":262145)", R"("bytes":262144)"), "digests: are 64 digits"));
  EXPECT_TRUE(refused(edited(R"("bytes":262145)", R"("bytes":-1)"), "bytes"));
  EXPECT_TRUE(refused(edited(R"("bytes":262145)", R"("bytes":18446744073709551615)"), "digests"));
  EXPECT_TRUE(
      refused(edited(R"("bytes":0,"digests":"")", R"("bytes":0,"digests":"0")"), "digests"));
  const std::string first = digest_of(std::string_view("a")).hex();
  EXPECT_TRUE(refused(edited(first, "X" + first.substr(1)), "hexadecimal"));
  EXPECT_TRUE(refused(edited(first, first.substr(1)), "digests: are 63 digits"));
}

TEST(RankFile, WhatLiesIsRefused) {
  EXPECT_TRUE(refused(""));
  EXPECT_TRUE(refused("[]"));
  EXPECT_TRUE(refused("{}", "format"));
  EXPECT_TRUE(refused(edited(R"("step":1200)", R"("step":-1)"), "step"));
  EXPECT_TRUE(refused(edited(R"("rank":3)", R"("rank":4294967296)"), "rank"));
  EXPECT_TRUE(refused(edited("model-00001", "../model-00001"), "shards[0].name"));
  EXPECT_TRUE(refused(edited("optimizer-", "model-"), "twice"));
  EXPECT_TRUE(
      refused(edited(R"("name":"","bytes":0)", R"("name":"big \"one\"","bytes":0)"), "twice"));
  EXPECT_TRUE(refused(edited(R"("name":"","bytes":0)", R"("name":"\u0000","bytes":0)"), "NUL"));
  EXPECT_TRUE(refused(edited(R"("rank":3)", R"("rank":3,"rank":3)"), "twice"));
  EXPECT_TRUE(refused(edited(R"("rank":3)", R"("rank":3,"new":)" + std::string(99, '[') + "1" +
                                                std::string(99, ']')),
                      "nested"));
  EXPECT_TRUE(refused(edited(R"("run":"0)", "\"run\":\"\xff")));
}

TEST(RankFile, VersionsAreMindedAndUnknownMembersAreNot) {
  EXPECT_TRUE(
      refused(edited(R"("major":1)", R"("major":2)"), "version 2.0", ErrorCode::kUnsupported));
  EXPECT_TRUE(
      refused(edited(R"("requires":[])", R"("requires":["x"])"), "'x'", ErrorCode::kUnsupported));
  EXPECT_TRUE(parse_rank_file(edited(R"("minor":0)", R"("minor":9)")));
  EXPECT_TRUE(parse_rank_file(edited(R"("rank":3)", R"("rank":3,"new":{"a":[1]})")));
}

TEST(RankFile, OneThatIsTooLargeIsRefused) {
  std::string text = write_rank_file(example());
  text.append(kRankFileBytesMax - text.size() + 1, ' ');
  EXPECT_TRUE(refused(text, "at most"));
}

}  // namespace
}  // namespace strandline::format
