#include "format/safetensors.h"

#include <gtest/gtest.h>

#include <array>
#include <fstream>
#include <iterator>
#include <string>

#include "format/tensor_size.h"

namespace strandline::format {
namespace {

std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

std::string little_endian(std::uint64_t number) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(number >> (8 * i) & 0xff);
  return bytes;
}

// The header with this JSON, of a file with this many bytes of data.
Result<ShardHeader> parse(std::string_view json, std::uint64_t data_bytes) {
  const std::string head = little_endian(json.size()) + std::string(json);
  return parse_safetensors_header(as_bytes(head), head.size() + data_bytes);
}

testing::AssertionResult refused(std::string_view json, std::uint64_t data_bytes,
                                 std::string_view reason = "") {
  const auto header = parse(json, data_bytes);
  if (header) return testing::AssertionFailure() << "accepted: " << json;
  if (header.error().code != ErrorCode::kCorrupt) {
    return testing::AssertionFailure() << "not as corrupt: " << header.error().message;
  }
  if (header.error().message.find(reason) == std::string::npos) {
    return testing::AssertionFailure() << "for another reason: " << header.error().message;
  }
  return testing::AssertionSuccess();
}

std::vector<ShardTensor> tensors_of_every_type() {
  std::vector<ShardTensor> tensors;
  std::uint64_t end = 0;
  for (std::uint8_t i = 0; i < kDTypeCount; ++i) {
    const auto dtype = static_cast<DType>(i);
    ShardTensor tensor{.name = "tensor " + std::string(dtype_name(dtype)),
                       .dtype = dtype,
                       .shape = {2, 4},
                       .begin = end,
                       .end = end + dtype_bits(dtype)};
    end = tensor.end;
    tensors.push_back(tensor);
  }
  return tensors;
}

void expect_equal(const std::vector<ShardTensor>& a, const std::vector<ShardTensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].name, b[i].name);
    EXPECT_EQ(a[i].dtype, b[i].dtype);
    EXPECT_EQ(a[i].shape, b[i].shape);
    EXPECT_EQ(a[i].begin, b[i].begin);
    EXPECT_EQ(a[i].end, b[i].end);
  }
}

TEST(Safetensors, HeadersRoundTripForEveryType) {
  const auto tensors = tensors_of_every_type();
  const std::string head = write_safetensors_header(tensors);
  const auto header = parse_safetensors_header(as_bytes(head), head.size() + tensors.back().end);
  ASSERT_TRUE(header) << header.error().message;
  EXPECT_EQ(header->data_start, head.size());
  expect_equal(header->tensors, tensors);
}

TEST(Safetensors, TheDataBeginsAtAnAlignedOffset) {
  std::vector<ShardTensor> tensors;
  for (std::uint64_t i = 0; i < 200; ++i) {
    EXPECT_EQ(write_safetensors_header(tensors).size() % kDataAlignmentBytes, 0u);
    tensors.push_back({.name = std::to_string(i), .shape = {1}, .begin = i, .end = i + 1});
  }
}

TEST(Safetensors, NamesMayHoldAnythingButNul) {
  const std::vector<ShardTensor> tensors{{.name = "", .shape = {0}},
                                         {.name = "a\"\\\n\x01 \xe2\x82\xac.b", .shape = {0}}};
  const std::string head = write_safetensors_header(tensors);
  const auto header = parse_safetensors_header(as_bytes(head), head.size());
  ASSERT_TRUE(header) << header.error().message;
  expect_equal(header->tensors, tensors);
  EXPECT_TRUE(refused(R"({"a\u0000b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0, "NUL"));
}

TEST(Safetensors, AFileOfThePackageIsRead) {
  std::ifstream stream(std::string(STRANDLINE_SOURCE_DIR) +
                           "/tests/golden/safetensors/written_by_safetensors.safetensors",
                       std::ios::binary);
  const std::string file{std::istreambuf_iterator<char>(stream), {}};
  ASSERT_GT(file.size(), 8u);
  const auto bytes = as_bytes(file);
  const auto start = safetensors_data_start(bytes.first<8>(), file.size());
  ASSERT_TRUE(start) << start.error().message;
  const auto header = parse_safetensors_header(bytes.first(*start), file.size());
  ASSERT_TRUE(header) << header.error().message;
  ASSERT_EQ(header->tensors.size(), 7u);
  const auto find = [&](std::string_view name) {
    for (const ShardTensor& tensor : header->tensors) {
      if (tensor.name == name) return tensor;
    }
    return ShardTensor{};
  };
  EXPECT_EQ(find("weight").dtype, DType::kF32);
  EXPECT_EQ(find("weight").shape, (std::vector<std::uint64_t>{2, 3}));
  EXPECT_EQ(find("empty").shape, (std::vector<std::uint64_t>{0, 5}));
  EXPECT_EQ(find("fp8").dtype, DType::kF8E4M3);
  EXPECT_EQ(find("complex").dtype, DType::kC64);
  EXPECT_EQ(find("na\xc3\xafve \"quoted\"").dtype, DType::kBool);
  const ShardTensor scalar = find("scalar");
  ASSERT_EQ(scalar.end - scalar.begin, 8u);
  double value = 0;
  std::copy_n(file.data() + *start + scalar.begin, 8, reinterpret_cast<char*>(&value));
  EXPECT_EQ(value, 2.5);
}

TEST(Safetensors, TensorsComeInTheOrderOfTheirBytes) {
  const auto header = parse(R"({"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},
                                "none":{"dtype":"U8","shape":[0],"data_offsets":[1,1]},
                                "a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}   )",
                            3);
  ASSERT_TRUE(header) << header.error().message;
  EXPECT_EQ(header->tensors[0].name, "a");
  EXPECT_EQ(header->tensors[1].name, "none");
  EXPECT_EQ(header->tensors[2].name, "b");
}

TEST(Safetensors, LengthsBeyondTheFileOrTheLimitAreRefused) {
  const auto start = [](std::uint64_t length, std::uint64_t file_bytes) {
    const std::string prefix = little_endian(length);
    return safetensors_data_start(as_bytes(prefix).first<8>(), file_bytes);
  };
  EXPECT_EQ(*start(2, 10), 10u);
  EXPECT_EQ(*start(kSafetensorsHeaderBytesMax, ~0ull), kSafetensorsHeaderBytesMax + 8);
  for (const auto& [length, file_bytes] : std::vector<std::pair<std::uint64_t, std::uint64_t>>{
           {3, 10},
           {0, 7},
           {~0ull, 10},
           {~0ull - 7, ~0ull},
           {1ull << 63, ~0ull},
           {kSafetensorsHeaderBytesMax + 1, ~0ull}}) {
    ASSERT_FALSE(start(length, file_bytes)) << length;
    EXPECT_EQ(start(length, file_bytes).error().code, ErrorCode::kCorrupt);
  }
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const auto tensors = tensors_of_every_type();
  const std::string head = write_safetensors_header(tensors);
  for (std::size_t size = 0; size < head.size(); ++size) {
    EXPECT_FALSE(parse_safetensors_header(as_bytes(head).first(size), size)) << size;
  }
  for (std::uint64_t missing = 1; missing <= tensors.back().end; ++missing) {
    EXPECT_FALSE(
        parse_safetensors_header(as_bytes(head), head.size() + tensors.back().end - missing));
  }
}

TEST(Safetensors, GapsOverlapsAndTrailingBytesAreRefused) {
  const auto json = [](std::string_view a, std::string_view b) {
    return R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + std::string(a) +
           R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + std::string(b) + "}}";
  };
  EXPECT_TRUE(parse(json("[0,4]", "[4,8]"), 8));
  EXPECT_TRUE(refused(json("[0,4]", "[5,9]"), 9, "gap"));
  EXPECT_TRUE(refused(json("[1,5]", "[5,9]"), 9, "gap"));
  EXPECT_TRUE(refused(json("[0,4]", "[3,7]"), 7, "overlap"));
  EXPECT_TRUE(refused(json("[0,4]", "[0,4]"), 4, "overlap"));
  EXPECT_TRUE(refused(json("[0,4]", "[4,8]"), 9, "the file holds 9"));
  EXPECT_TRUE(refused(json("[0,4]", "[4,8]"), 7, "the file holds 7"));
  EXPECT_TRUE(refused("{}", 1));
  EXPECT_TRUE(parse("{}", 0));
}

TEST(Safetensors, SizesThatAreNegativeOverflowOrDoNotFitAreRefused) {
  const auto json = [](std::string_view dtype, std::string_view shape, std::string_view offsets) {
    return R"({"a":{"dtype":")" + std::string(dtype) + R"(","shape":)" + std::string(shape) +
           R"(,"data_offsets":)" + std::string(offsets) + "}}";
  };
  EXPECT_TRUE(parse(json("F32", "[2,3]", "[0,24]"), 24));
  EXPECT_TRUE(parse(json("F4", "[3,2]", "[0,3]"), 3));
  EXPECT_TRUE(refused(json("F32", "[2,3]", "[0,23]"), 23, "need 24"));
  EXPECT_TRUE(refused(json("F32", "[2,-3]", "[0,24]"), 24));
  EXPECT_TRUE(refused(json("F32", "[2,3.0]", "[0,24]"), 24));
  EXPECT_TRUE(refused(json("F32", "[\"2\",3]", "[0,24]"), 24));
  EXPECT_TRUE(refused(json("F32", "6", "[0,24]"), 24));
  EXPECT_TRUE(refused(json("F32", "[6]", "[24,0]"), 24, "ends before"));
  EXPECT_TRUE(refused(json("F32", "[6]", "[-24,0]"), 24));
  EXPECT_TRUE(refused(json("F32", "[6]", "[0]"), 24, "two offsets"));
  EXPECT_TRUE(refused(json("F32", "[6]", "[0,24,24]"), 24, "two offsets"));
  EXPECT_TRUE(refused(json("F32", "[4294967296,4294967296]", "[0,0]"), 0, "overflows"));
  EXPECT_TRUE(refused(json("U64", "[2305843009213693952]", "[0,0]"), 0, "overflows"));
  EXPECT_TRUE(refused(json("U8", "[18446744073709551616]", "[0,0]"), 0));
  EXPECT_TRUE(refused(json("F4", "[3]", "[0,1]"), 1, "whole bytes"));
  EXPECT_TRUE(refused(json("F32", "[6]", "[18446744073709551592,0]"), 24));
  EXPECT_TRUE(refused(json("C128", "[1]", "[0,16]"), 16, "element type"));
  EXPECT_TRUE(refused(json("f32", "[6]", "[0,24]"), 24, "element type"));
}

TEST(Safetensors, WhatIsNoHeaderIsRefused) {
  EXPECT_TRUE(refused("", 0));
  EXPECT_TRUE(refused("[]", 0, "'{'"));
  EXPECT_TRUE(refused(" {}", 0, "'{'"));
  EXPECT_TRUE(refused("{} {}", 0));
  EXPECT_TRUE(refused(std::string_view("{}\0", 3), 0));
  EXPECT_TRUE(refused(R"({"a":1})", 0, "not an object"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"U8","shape":[0]}})", 0, "data_offsets"));
  EXPECT_TRUE(refused(R"({"__metadata__":"pt"})", 0, "not an object"));
  EXPECT_TRUE(refused(R"({"__metadata__":{"a":1}})", 0, "not text"));
  EXPECT_TRUE(refused("{\"a\":" + std::string(50'000, '['), 0));
  EXPECT_TRUE(refused("{\"\xff\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},
                          "a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
                      0, "twice"));
  EXPECT_TRUE(
      refused(R"({"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0, "twice"));
}

TEST(Safetensors, MembersThatALaterVersionAddsAreIgnored) {
  EXPECT_TRUE(parse(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"new":{"x":[1]}}})", 1));
}

TEST(TensorBytes, CountsPackedEmptyAndScalarTensors) {
  using Shape = std::vector<std::uint64_t>;
  EXPECT_EQ(tensor_bytes(DType::kF64, Shape{}), 8u);
  EXPECT_EQ(tensor_bytes(DType::kF6E2M3, (Shape{2, 2})), 3u);
  EXPECT_EQ(tensor_bytes(DType::kF6E2M3, Shape{2}), std::nullopt);
  EXPECT_EQ(tensor_bytes(DType::kF32, (Shape{~0ull, ~0ull, 0})), 0u);
  EXPECT_EQ(tensor_bytes(DType::kU8, Shape{1ull << 60}), 1ull << 60);
  EXPECT_EQ(tensor_bytes(DType::kU8, Shape{1ull << 61}), std::nullopt);
}

}  // namespace
}  // namespace strandline::format
