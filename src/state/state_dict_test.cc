#include "strandline/state_dict.h"

#include <gtest/gtest.h>

#include <array>
#include <limits>

namespace strandline {
namespace {

TEST(StateDict, InitializerListsNestAndKeepOrder) {
  std::vector<float> weights(6);
  const StateDict state{{"model", StateDict{{"weight", TensorView::of(weights, {2, 3})}}},
                        {"epoch", 3},
                        {"name", "adam"}};
  ASSERT_TRUE(state.construction());
  const Structure& structure = state.structure();
  ASSERT_EQ(structure.nodes().size(), 5u);
  EXPECT_EQ(structure.path_text(2), "model.weight");
  EXPECT_EQ(structure.tensors().front().shape, (std::vector<std::uint64_t>{2, 3}));
  EXPECT_EQ(*state.value("epoch")->get_if<std::int64_t>(), 3);
  EXPECT_EQ(state.tensor("model.weight")->data, reinterpret_cast<const std::byte*>(weights.data()));
  EXPECT_EQ(state.value("model.weight").error().code, ErrorCode::kNotFound);
  EXPECT_EQ(state.byte_count(), 24u);
}

TEST(StateDict, AKeyGivenTwiceIsReportedWithItsPath) {
  const StateDict state{{"outer", StateDict{{"a", 1}, {"a", 2}}}};
  ASSERT_FALSE(state.construction());
  EXPECT_NE(state.construction().error().message.find("'a'"), std::string::npos);
}

TEST(StateDict, KeysOfDifferentTypesAreDifferentKeys) {
  StateDictBuilder builder;
  for (const Key& key : {Key(1), Key(true), Key("1"), Key(1.0), Key(Value::Bytes{"1"}), Key()}) {
    ASSERT_TRUE(builder.value(key, key.text()));
  }
  const StateDict state = *builder.finish();
  EXPECT_EQ(*state.values()[*state.structure().child(0, Key(true)) - 1].get_if<std::string>(),
            "True");
  EXPECT_EQ(*state.values()[*state.structure().child(0, Key("1")) - 1].get_if<std::string>(),
            "'1'");
}

TEST(StateDict, AMovedFromStateIsAnEmptyDict) {
  StateDict state{{"epoch", 3}};
  const StateDict taken = std::move(state);
  EXPECT_EQ(taken.values().size(), 1u);
  EXPECT_EQ(state.structure().nodes().size(), 1u);  // NOLINT(bugprone-use-after-move)
}

TEST(Structure, AnExactKeyWinsOverADottedPath) {
  const StateDict state{
      {"a", StateDict{{"b", 1}, {"b.c", 2}}}, {"a.b", StateDict{{"c", 3}}}, {"a.b.c", 4}};
  EXPECT_EQ(*state.value("a.b.c")->get_if<std::int64_t>(), 4);
  const StateDict other{{"a", StateDict{{"b", 1}, {"b.c", 2}}}, {"a.b", StateDict{{"c", 3}}}};
  EXPECT_EQ(*other.value("a.b.c")->get_if<std::int64_t>(), 3);
  EXPECT_EQ(*other.value("a.b").error().key_path.c_str(), 'a');
}

TEST(Structure, PathsLeadThroughListsByIndexAndThroughTypedKeys) {
  StateDictBuilder builder;
  ASSERT_TRUE(builder.begin("groups", NodeKind::kList));
  ASSERT_TRUE(builder.begin({}, NodeKind::kTuple));
  ASSERT_TRUE(builder.value({}, 0.9));
  ASSERT_TRUE(builder.value({}, 0.999));
  ASSERT_TRUE(builder.end());
  ASSERT_TRUE(builder.end());
  const StateDict state = *builder.finish();
  EXPECT_EQ(*state.value("groups.0.1")->get_if<double>(), 0.999);
  EXPECT_TRUE(state.structure().find(KeyPath{"groups", 0, 1}));
  EXPECT_FALSE(state.structure().find(KeyPath{"groups", "0", 1}));
}

TEST(Structure, EqualStructuresHashEqualAndDifferentOnesDiffer) {
  std::array<float, 4> a{};
  std::array<float, 4> b{};
  std::array<double, 4> c{};
  const StateDict first{{"w", TensorView::of(a)}, {"step", 1}};
  const StateDict same{{"w", TensorView::of(b)}, {"step", 2}};
  const StateDict other{{"w", TensorView::of(c)}, {"step", 1}};
  EXPECT_EQ(first.structure().hash(), same.structure().hash());
  EXPECT_NE(first.structure().hash(), other.structure().hash());
}

TEST(StateDictBuilder, RefusesTooDeepNestingWithItsPath) {
  StateDictBuilder builder;
  Status status;
  std::uint32_t levels = 1;
  while ((status = builder.begin("d", NodeKind::kDict))) ++levels;
  EXPECT_EQ(levels, kStateDepthMax);
  EXPECT_EQ(status.error().code, ErrorCode::kInvalidArgument);
  EXPECT_TRUE(status.error().key_path.starts_with("d.d."));
}

TEST(StateDictBuilder, RefusesUnbalancedCalls) {
  StateDictBuilder builder;
  EXPECT_FALSE(builder.end());
  ASSERT_TRUE(builder.begin("d", NodeKind::kDict));
  EXPECT_FALSE(builder.finish());
}

TEST(StateDictBuilder, CopiesAStateWithItsMetadata) {
  StateDictBuilder inner(NodeKind::kOrderedDict);
  ASSERT_TRUE(inner.begin_metadata(NodeKind::kDict));
  ASSERT_TRUE(inner.value("version", 1));
  ASSERT_TRUE(inner.end());
  EXPECT_FALSE(inner.begin_metadata(NodeKind::kDict));
  ASSERT_TRUE(inner.value("version", 2));
  const StateDict copied = *inner.finish();
  StateDictBuilder outer;
  ASSERT_TRUE(outer.state("model", copied));
  const StateDict state = *outer.finish();
  EXPECT_TRUE(state.structure().nodes()[2].metadata);
  EXPECT_EQ(*state.value("model.version")->get_if<std::int64_t>(), 2);
}

TEST(TensorView, AViewBeyondItsStorageIsRefused) {
  std::vector<float> storage(8);
  TensorView view = TensorView::of(storage);
  EXPECT_TRUE(view.check());
  view.storage_bytes = 16;  // As after a resize.
  ASSERT_FALSE(view.check());
  EXPECT_NE(view.check().error().message.find("freed or resized"), std::string::npos);
  view.storage_bytes = 32;
  view.data = reinterpret_cast<std::byte*>(storage.data() + 7);
  view.shape = {8};
  view.strides_bytes = {-4};
  EXPECT_TRUE(view.check());
  EXPECT_EQ(view.reach_bytes(), (std::pair<std::int64_t, std::int64_t>{-28, 4}));
  view.strides_bytes = {-8};
  EXPECT_FALSE(view.check());
}

TEST(TensorView, SizesThatOverflowAreRefusedAndEmptyOnesAreNot) {
  TensorView view;
  view.dtype = DType::kF32;
  view.shape = {std::numeric_limits<std::uint64_t>::max() / 2, 16};
  view.strides_bytes = {64, 4};
  EXPECT_FALSE(view.check());
  view.shape = {std::numeric_limits<std::uint64_t>::max(), 0, 16};
  view.strides_bytes = {64, 64, 4};
  EXPECT_TRUE(view.check());
  EXPECT_EQ(view.byte_count(), 0u);
}

TEST(TensorView, RowMajorIsToldFromItsImitations) {
  std::vector<std::int16_t> storage(24);
  TensorView view = TensorView::of(storage, {2, 3, 4});
  EXPECT_TRUE(view.is_row_major());
  std::swap(view.strides_bytes[1], view.strides_bytes[2]);
  std::swap(view.shape[1], view.shape[2]);
  EXPECT_FALSE(view.is_row_major());
  view = TensorView::of(storage, {24});
  view.shape = {1, 24, 1};
  view.strides_bytes = {7, 2, 99};  // Strides of extent-1 dimensions mean nothing.
  EXPECT_TRUE(view.is_row_major());
  view.shape = {24};
  view.strides_bytes = {0};
  EXPECT_FALSE(view.is_row_major());
}

TEST(TensorView, PackedTypesMustFillWholeBytes) {
  std::array<std::uint8_t, 3> bytes{};
  TensorView view = TensorView::row_major(bytes.data(), DType::kF6E2M3, {2, 2});
  EXPECT_TRUE(view.check());
  EXPECT_EQ(view.byte_count(), 3u);
  view = TensorView::row_major(bytes.data(), DType::kF4, {3});
  EXPECT_FALSE(view.check());
}

TEST(Value, IdenticalMeansToTheLastBit) {
  EXPECT_TRUE(Value(std::numeric_limits<double>::quiet_NaN())
                  .identical(Value(std::numeric_limits<double>::quiet_NaN())));
  EXPECT_FALSE(Value(0.0).identical(Value(-0.0)));
  EXPECT_FALSE(Value(1).identical(Value(true)));
  EXPECT_FALSE(Value(1).identical(Value(1.0)));
  EXPECT_FALSE(Value("a").identical(Value(Value::Bytes{"a"})));
  EXPECT_TRUE(Value(Value::Tagged{"t", {1, "x"}}).identical(Value(Value::Tagged{"t", {1, "x"}})));
}

TEST(Value, IntegersOutside64BitsBecomeBigIntegers) {
  EXPECT_EQ(Value(std::numeric_limits<std::uint64_t>::max()).get_if<Value::BigInteger>()->decimal,
            "18446744073709551615");
  EXPECT_NE(Value(std::numeric_limits<std::int64_t>::min()).get_if<std::int64_t>(), nullptr);
}

TEST(DType, NamesRoundTripAndUnknownOnesAreNothing) {
  for (std::uint8_t i = 0; i < kDTypeCount; ++i) {
    const auto dtype = static_cast<DType>(i);
    EXPECT_EQ(dtype_from_name(dtype_name(dtype)), dtype);
  }
  EXPECT_FALSE(dtype_from_name("C128"));
}

}  // namespace
}  // namespace strandline
