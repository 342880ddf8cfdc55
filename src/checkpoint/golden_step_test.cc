// A whole step as version 1.0 of the format wrote it. If this fails, the format has changed, and
// readers of what users have on disk break.

#include <gtest/gtest.h>

#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "strandline/checkpoint.h"
#include "testing/checkpoint_fixture.h"

namespace strandline {
namespace {

using testing::must;

const std::filesystem::path kStep = STRANDLINE_SOURCE_DIR "/tests/golden/step-v1.0";

template <typename Element>
void expect_tensor(const StateDict& state, const char* name,
                   const std::vector<std::uint64_t>& shape, const std::vector<Element>& elements) {
  const TensorView view = must(state.tensor(name));
  EXPECT_EQ(view.dtype, dtype_of<Element>()) << name;
  EXPECT_EQ(view.shape, shape) << name;
  const auto bytes = std::as_bytes(std::span(elements));
  EXPECT_EQ(testing::bytes_of(view), std::vector<std::byte>(bytes.begin(), bytes.end())) << name;
}

TEST(GoldenStep, IsIntactAndSaysWhatItSaid) {
  const Checkpoint checkpoint = must(Checkpoint::open(kStep));
  EXPECT_TRUE(must(checkpoint.verify()).empty());
  const CheckpointInfo& info = checkpoint.info();
  EXPECT_EQ(info.step, 12);
  EXPECT_EQ(info.sequence, 1u);
  EXPECT_EQ(info.parent, std::nullopt);
  EXPECT_EQ(info.format_major, 1u);
  EXPECT_EQ(info.format_minor, 0u);
  EXPECT_EQ(info.files.size(), 7u);
  EXPECT_EQ(info.metrics, (std::map<std::string, double>{{"loss", 2.25}}));
  EXPECT_TRUE(must(info.metadata.value("note")).identical("golden"));
}

TEST(GoldenStep, LoadsAsItWasSaved) {
  const StateDict state = must(load(kStep)).state;
  expect_tensor<float>(state, "model.weight", {3, 2}, {1.5f, -2.25f, 0.0f, 3.0f, 4.0f, -0.5f});
  expect_tensor<float>(state, "model.row", {2}, {0.0f, 3.0f});  // An alias into the weight.
  expect_tensor<double>(state, "optimizer.moments", {2}, {0.125, -1e300});
  expect_tensor<std::uint8_t>(state, "rng", {4}, {0, 1, 254, 255});
  const auto expect_value = [&state](const char* name, const Value& value) {
    EXPECT_TRUE(must(state.value(name)).identical(value)) << name;
  };
  expect_value("optimizer.lr", 0.1);
  expect_value("values.none", Value::None{});
  expect_value("values.yes", true);
  expect_value("values.integer", std::int64_t{-7});
  expect_value("values.big", Value::BigInteger{"18446744073709551616"});
  expect_value("values.minus_zero", -0.0);
  expect_value("values.infinity", std::numeric_limits<double>::infinity());
  expect_value("values.text", "gr\xc3\xbc\xc3\x9f");
  expect_value("values.bytes", Value::Bytes{"\x01\xff"});
  expect_value("values.list", Value::List{Value(1), Value("x")});
  Value::Tagged size;
  size.tag = "torch.Size";
  size.fields = {Value(3), Value(2)};
  expect_value("values.size", size);
}

}  // namespace
}  // namespace strandline
