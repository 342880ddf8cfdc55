// The host device against a reference that looks up every byte by its index.

#include "device/host_device.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <complex>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace strandline::device {
namespace {

using Bytes = std::vector<std::byte>;

constexpr std::array<DType, 19> kWholeByteTypes = {
    DType::kBool,   DType::kU8,         DType::kI8,         DType::kF8E5M2, DType::kF8E4M3,
    DType::kF8E8M0, DType::kF8E4M3FNUZ, DType::kF8E5M2FNUZ, DType::kI16,    DType::kU16,
    DType::kF16,    DType::kBF16,       DType::kI32,        DType::kU32,    DType::kF32,
    DType::kC64,    DType::kF64,        DType::kI64,        DType::kU64};

bool is_integer(DType dtype) {
  return dtype == DType::kU8 || dtype == DType::kI8 || dtype == DType::kI16 ||
         dtype == DType::kU16 || dtype == DType::kI32 || dtype == DType::kU32 ||
         dtype == DType::kI64 || dtype == DType::kU64;
}
bool can_be_negative(DType dtype) { return dtype != DType::kBool && dtype != DType::kF8E8M0; }

// The reference: what one element's bytes become, byte by byte, little endian.
void resolve(Bytes& element, DType dtype, bool conjugate, bool negative) {
  const auto flip = [&](std::size_t byte) { element[byte] ^= std::byte{0x80}; };
  if (dtype == DType::kC64) {
    if (conjugate) flip(7);
    if (negative) {
      flip(3);
      flip(7);
    }
  } else if (negative && is_integer(dtype)) {
    unsigned carry = 1;
    for (std::byte& byte : element) {
      const unsigned sum = (~std::to_integer<unsigned>(byte) & 0xff) + carry;
      byte = static_cast<std::byte>(sum & 0xff);
      carry = sum >> 8;
    }
  } else if (negative && (dtype == DType::kF8E4M3FNUZ || dtype == DType::kF8E5M2FNUZ)) {
    if ((element[0] & std::byte{0x7f}) != std::byte{0}) flip(0);
  } else if (negative) {
    flip(element.size() - 1);
  }
}

// Where the element with a row-major number lies.
std::byte* place(const TensorView& view, std::uint64_t number) {
  std::byte* at = view.data;
  for (std::size_t i = view.shape.size(); i-- > 0;) {
    at += static_cast<std::int64_t>(number % view.shape[i]) * view.strides_bytes[i];
    number /= view.shape[i];
  }
  return at;
}

Bytes reference(const TensorView& view) {
  Bytes all;
  const std::size_t size = dtype_bits(view.dtype) / 8;
  for (std::uint64_t i = 0; i < view.element_count(); ++i) {
    const std::byte* at = place(view, i);
    Bytes element(at, at + size);
    resolve(element, view.dtype, view.conjugate, view.negative);
    all.insert(all.end(), element.begin(), element.end());
  }
  return all;
}

Status gather(const TensorView& view, std::uint64_t first, std::span<std::byte> host) {
  HostDevice device;
  Status status = failure(ErrorCode::kIo, "not completed");
  int completions = 0;
  device.copy_to_host_async(view, first, host, [&](Status done) {
    status = std::move(done);
    ++completions;
  });
  EXPECT_EQ(completions, 1);
  return status;
}
Status scatter(const TensorView& view, std::uint64_t first, std::span<const std::byte> host) {
  HostDevice device;
  Status status = failure(ErrorCode::kIo, "not completed");
  int completions = 0;
  device.copy_from_host_async(host, view, first, [&](Status done) {
    status = std::move(done);
    ++completions;
  });
  EXPECT_EQ(completions, 1);
  return status;
}

// A view of random shape over its own storage; expanded only where allowed.
struct RandomView {
  Bytes storage;
  TensorView view;

  RandomView(std::mt19937_64& random, bool may_expand) {
    view.dtype = kWholeByteTypes[random() % kWholeByteTypes.size()];
    const auto size = static_cast<std::int64_t>(dtype_bits(view.dtype) / 8);
    const std::size_t rank = random() % 5;
    view.shape.resize(rank);
    view.strides_bytes.resize(rank);
    for (auto& extent : view.shape) extent = random() % 12 == 0 ? 0 : 1 + random() % 5;
    // Strides that keep elements apart: nest the dimensions in a random order, with random gaps.
    std::vector<std::size_t> order(rank);
    std::iota(order.begin(), order.end(), std::size_t{0});
    const bool row_major = random() % 3 == 0;
    std::reverse(order.begin(), order.end());
    if (!row_major) std::shuffle(order.begin(), order.end(), random);
    std::int64_t span = size;
    std::int64_t begin = 0;  // How far below `data` the view reaches.
    for (const std::size_t i : order) {
      if (may_expand && random() % 6 == 0) {
        view.strides_bytes[i] = 0;
        continue;
      }
      const std::int64_t gap = random() % 3 == 0 ? static_cast<std::int64_t>(random() % 3) * 1 : 0;
      const std::int64_t stride = span + gap;
      const auto extent = static_cast<std::int64_t>(std::max<std::uint64_t>(view.shape[i], 1));
      const bool reversed = random() % 4 == 0;
      view.strides_bytes[i] = reversed ? -stride : stride;
      if (reversed) begin += stride * (extent - 1);
      span = stride * (extent - 1) + span;
    }
    storage.resize(static_cast<std::size_t>(span));
    for (auto& byte : storage) byte = static_cast<std::byte>(random());
    view.data = storage.data() + begin;
    view.storage_base = storage.data();
    view.storage_bytes = storage.size();
    view.writable = true;
    view.conjugate = random() % 4 == 0;
    view.negative = can_be_negative(view.dtype) && random() % 4 == 0;
    EXPECT_TRUE(view.check());
  }
};

TEST(HostDevice, GathersAnyRangeOfAnyViewAsTheReferenceDoes) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 4000; ++round) {
    const RandomView subject(random, true);
    const Bytes expected = reference(subject.view);
    ASSERT_EQ(expected.size(), subject.view.byte_count());
    const std::uint64_t first = random() % (expected.size() + 1);
    const std::uint64_t bytes = random() % (expected.size() - first + 1);
    Bytes host(bytes + 2, std::byte{0xee});
    ASSERT_TRUE(gather(subject.view, first, std::span(host).subspan(1, bytes)));
    ASSERT_TRUE(std::equal(host.begin() + 1, host.end() - 1,
                           expected.begin() + static_cast<std::ptrdiff_t>(first)))
        << "round " << round;
    ASSERT_EQ(host.front(), std::byte{0xee});
    ASSERT_EQ(host.back(), std::byte{0xee});
  }
}

TEST(HostDevice, ScattersAnyRangeAndTouchesNothingElse) {
  std::mt19937_64 random(2);
  for (int round = 0; round < 4000; ++round) {
    RandomView subject(random, false);
    Bytes values = reference(subject.view);
    const std::uint64_t first = random() % (values.size() + 1);
    const std::uint64_t bytes = random() % (values.size() - first + 1);
    for (std::uint64_t i = 0; i < bytes; ++i) values[first + i] = static_cast<std::byte>(random());
    // What the storage must be afterwards: every element written back whole.
    Bytes expected = subject.storage;
    const std::size_t size = dtype_bits(subject.view.dtype) / 8;
    for (std::uint64_t i = 0; i < subject.view.element_count(); ++i) {
      const auto at = values.begin() + static_cast<std::ptrdiff_t>(i * size);
      Bytes element(at, at + static_cast<std::ptrdiff_t>(size));
      resolve(element, subject.view.dtype, subject.view.conjugate, subject.view.negative);
      std::copy(element.begin(), element.end(),
                expected.begin() + (place(subject.view, i) - subject.storage.data()));
    }
    ASSERT_TRUE(scatter(subject.view, first, std::span(values).subspan(first, bytes)));
    ASSERT_EQ(subject.storage, expected) << "round " << round;
  }
}

TEST(HostDevice, ChunksPutTogetherAreTheWhole) {
  std::mt19937_64 random(3);
  std::vector<std::uint16_t> storage(64 * 33);
  for (auto& each : storage) each = static_cast<std::uint16_t>(random());
  TensorView view = TensorView::of(storage, {64, 33});
  view.shape = {33, 64};
  view.strides_bytes = {2, 66};
  view.dtype = DType::kBF16;
  view.negative = true;
  const Bytes expected = reference(view);
  Bytes host(expected.size());
  for (std::uint64_t at = 0; at < host.size(); at += 101) {
    ASSERT_TRUE(gather(
        view, at, std::span(host).subspan(at, std::min<std::uint64_t>(101, host.size() - at))));
  }
  EXPECT_EQ(host, expected);
}

TEST(HostDevice, ConjugateAndNegativeViewsGiveTheirValuesNotTheirBytes) {
  std::vector<std::complex<float>> storage = {{1, 2}, {-3, 4}};
  TensorView view = TensorView::row_major(storage.data(), DType::kC64, {2});
  view.conjugate = true;
  std::vector<std::complex<float>> host(2);
  ASSERT_TRUE(gather(view, 0, std::as_writable_bytes(std::span(host))));
  EXPECT_EQ(host, (std::vector<std::complex<float>>{{1, -2}, {-3, -4}}));
  view.negative = true;
  ASSERT_TRUE(gather(view, 0, std::as_writable_bytes(std::span(host))));
  EXPECT_EQ(host, (std::vector<std::complex<float>>{{-1, 2}, {3, 4}}));
  std::vector<double> doubles = {1.5, -2.5, 0.0};
  TensorView negative = TensorView::of(doubles);
  negative.negative = true;
  std::vector<double> resolved(3);
  ASSERT_TRUE(gather(negative, 0, std::as_writable_bytes(std::span(resolved))));
  EXPECT_EQ(resolved, (std::vector<double>{-1.5, 2.5, 0.0}));
  EXPECT_TRUE(std::signbit(resolved[2]));
}

TEST(HostDevice, NegatingAFnuzFloatKeepsItsZeroAndItsNan) {
  std::vector<std::uint8_t> storage = {0x00, 0x80, 0x01, 0x81};
  TensorView view = TensorView::row_major(storage.data(), DType::kF8E4M3FNUZ, {4});
  view.negative = true;
  std::vector<std::uint8_t> host(4);
  ASSERT_TRUE(gather(view, 0, std::as_writable_bytes(std::span(host))));
  EXPECT_EQ(host, (std::vector<std::uint8_t>{0x00, 0x80, 0x81, 0x01}));
}

TEST(HostDevice, PackedTypesAreCopiedAsTheyLie) {
  Bytes storage = {std::byte{0x12}, std::byte{0x34}, std::byte{0x56}};
  const TensorView view = TensorView::row_major(storage.data(), DType::kF4, {2, 3});
  Bytes host(2);
  ASSERT_TRUE(gather(view, 1, host));
  EXPECT_EQ(host, (Bytes{std::byte{0x34}, std::byte{0x56}}));
  ASSERT_TRUE(scatter(view, 0, host));
  EXPECT_EQ(storage[0], std::byte{0x34});
}

TEST(HostDevice, NegativeViewsOfTypesWithoutASignAreRefused) {
  Bytes storage(4);
  for (const DType dtype : {DType::kBool, DType::kF4, DType::kF6E2M3, DType::kF8E8M0}) {
    TensorView view = TensorView::row_major(storage.data(), dtype, {4});
    view.negative = true;
    Bytes host(1);
    const Status status = gather(view, 0, host);
    ASSERT_FALSE(status) << dtype_name(dtype);
    EXPECT_EQ(status.error().code, ErrorCode::kUnsupported);
    EXPECT_NE(status.error().message.find(dtype_name(dtype)), std::string::npos);
  }
}

TEST(HostDevice, RangesOutsideTheTensorAreRefused) {
  std::vector<float> storage(4);
  const TensorView view = TensorView::of(storage);
  Bytes host(8);
  EXPECT_TRUE(gather(view, 8, host));
  EXPECT_EQ(gather(view, 9, host).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(gather(view, ~0ull, host).error().code, ErrorCode::kInvalidArgument);
  EXPECT_TRUE(gather(view, 16, {}));
}

TEST(HostDevice, ExpandedAndReadOnlyDestinationsAreRefused) {
  std::vector<float> storage(4);
  TensorView view = TensorView::of(storage);
  view.shape = {3, 4};
  view.strides_bytes = {0, 4};
  EXPECT_EQ(scatter(view, 0, Bytes(48)).error().code, ErrorCode::kInvalidArgument);
  view.shape = {1, 4};
  EXPECT_TRUE(scatter(view, 0, Bytes(16)));
  view.writable = false;
  EXPECT_EQ(scatter(view, 0, Bytes(16)).error().code, ErrorCode::kInvalidArgument);
}

TEST(HostDevice, EmptyAndZeroDimensionalTensorsAreCopied) {
  double number = 2.5;
  double copy = 0;
  ASSERT_TRUE(gather(TensorView::row_major(&number, DType::kF64, {}), 0,
                     std::as_writable_bytes(std::span(&copy, 1))));
  EXPECT_EQ(copy, 2.5);
  EXPECT_TRUE(gather(TensorView::row_major(nullptr, DType::kF64, {3, 0, 2}), 0, {}));
}

}  // namespace
}  // namespace strandline::device
