#include "format/json_text.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <limits>
#include <random>

#include "format/base64.h"
#include "format/json_reader.h"

namespace strandline::format {
namespace {

std::string json_string(std::string_view text) {
  std::string out;
  append_json_string(out, text);
  return out;
}

std::string json_double(double number) {
  std::string out;
  append_json_double(out, number);
  return out;
}

TEST(JsonText, StringsAreEscapedAndUtf8PassesThrough) {
  EXPECT_EQ(json_string(""), R"("")");
  EXPECT_EQ(json_string("a\"b\\c/d"), R"("a\"b\\c/d")");
  EXPECT_EQ(json_string(std::string_view("\0\n\x1f\x7f", 4)), "\"\\u0000\\u000a\\u001f\x7f\"");
  EXPECT_EQ(json_string("caf\xc3\xa9 \xf0\x9f\x8c\x8a"), "\"caf\xc3\xa9 \xf0\x9f\x8c\x8a\"");
}

TEST(JsonText, EveryAsciiStringReadsBack) {
  std::string all;
  for (int c = 0; c < 0x80; ++c) all += static_cast<char>(c);
  const auto document = JsonDocument::parse("test", json_string(all), 4);
  ASSERT_TRUE(document) << document.error().message;
  const JsonNode root = document->root();
  EXPECT_EQ(*root.text(), all);
}

TEST(JsonText, OnlyUtf8IsUtf8) {
  EXPECT_TRUE(is_valid_utf8(""));
  EXPECT_TRUE(is_valid_utf8(std::string_view("a\0b", 3)));
  EXPECT_TRUE(is_valid_utf8("\xe2\x82\xac"));
  EXPECT_FALSE(is_valid_utf8("\x80"));
  EXPECT_FALSE(is_valid_utf8("\xc0\x80"));          // Overlong.
  EXPECT_FALSE(is_valid_utf8("\xe2\x82"));          // Cut.
  EXPECT_FALSE(is_valid_utf8("\xed\xa0\x80"));      // A surrogate.
  EXPECT_FALSE(is_valid_utf8("\xf4\x90\x80\x80"));  // Beyond Unicode.
}

TEST(JsonText, DoublesNeverLookLikeIntegers) {
  EXPECT_EQ(json_double(1.0), "1.0");
  EXPECT_EQ(json_double(-0.0), "-0.0");
  EXPECT_EQ(json_double(0.1), "0.1");
  EXPECT_EQ(json_double(1e22), "1e+22");
  EXPECT_EQ(json_double(9007199254740993.0), "9007199254740992.0");
}

TEST(JsonText, DoublesReadBackToTheLastBit) {
  std::mt19937_64 random(1);
  const auto check = [](double number) {
    const auto document = JsonDocument::parse("test", json_double(number), 4);
    ASSERT_TRUE(document) << json_double(number);
    const JsonNode root = document->root();
    ASSERT_EQ(root.type(), JsonNode::Type::kDouble) << json_double(number);
    EXPECT_EQ(std::bit_cast<std::uint64_t>(*root.number()), std::bit_cast<std::uint64_t>(number))
        << json_double(number);
  };
  for (const double number : {0.0, -0.0, 1.0, -1.0, 5e-324, 2.2250738585072014e-308,
                              std::numeric_limits<double>::max(), 123456789012345680.0}) {
    check(number);
  }
  for (int i = 0; i < 20'000; ++i) {
    const auto number = std::bit_cast<double>(random());
    if (number - number == 0) check(number);  // Finite.
  }
}

TEST(JsonText, IntegersAreWrittenInFull) {
  std::string out;
  append_json_integer(out, std::numeric_limits<std::int64_t>::min());
  out += ' ';
  append_json_unsigned(out, std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(out, "-9223372036854775808 18446744073709551615");
}

TEST(Base64, MatchesTheExamplesOfItsStandard) {
  const std::pair<std::string_view, std::string_view> examples[] = {
      {"", ""},
      {"f", "Zg=="},
      {"fo", "Zm8="},
      {"foo", "Zm9v"},
      {"foob", "Zm9vYg=="},
      {"fooba", "Zm9vYmE="},
      {"foobar", "Zm9vYmFy"},
  };
  for (const auto& [bytes, text] : examples) {
    std::string out;
    append_base64(out, bytes);
    EXPECT_EQ(out, text);
    EXPECT_EQ(from_base64(text), std::string(bytes));
  }
}

TEST(Base64, EveryByteReadsBack) {
  std::string bytes;
  for (int i = 0; i < 3 * 256; ++i) bytes += static_cast<char>(i * 7 % 256);
  for (std::size_t cut = 0; cut < 3; ++cut) {
    std::string out;
    append_base64(out, bytes.substr(cut));
    EXPECT_EQ(from_base64(out), bytes.substr(cut));
  }
}

TEST(Base64, OnlyTheOneTextOfSomeBytesIsTaken) {
  for (const std::string_view text : {"Z", "Zg", "Zg=", "Zh==", "Zm9=", "Zg==Zg==", "Zm9\n", "====",
                                      "=m8=", "Zm-_", " Zg==", "Z===", "\xff\xff\xff\xff"}) {
    EXPECT_FALSE(from_base64(text)) << text;
  }
}

}  // namespace
}  // namespace strandline::format
