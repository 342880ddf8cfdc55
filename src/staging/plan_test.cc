// Where tensors go: order, offsets, and who is whose alias.

#include "staging/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "format/safetensors.h"

namespace strandline::staging {
namespace {

Plan plan_of(const StateDict& state) {
  const auto plan = plan_files(state);
  EXPECT_TRUE(plan) << (plan ? "" : plan.error().text());
  return plan ? **plan : Plan{};
}

// A view of `floats` from an element on.
TensorView window(std::vector<float>& floats, std::size_t first, std::vector<std::uint64_t> shape) {
  TensorView view = TensorView::row_major(floats.data() + first, DType::kF32, std::move(shape));
  view.storage_base = reinterpret_cast<const std::byte*>(floats.data());
  view.storage_bytes = floats.size() * 4;
  return view;
}

TensorView strided(std::vector<float>& floats, std::size_t first, std::vector<std::uint64_t> shape,
                   std::vector<std::int64_t> strides) {
  TensorView view = window(floats, first, std::move(shape));
  view.strides_bytes.clear();
  for (const std::int64_t stride : strides) view.strides_bytes.push_back(stride * 4);
  return view;
}

struct Expected {
  std::optional<std::uint32_t> alias_of;
  std::uint64_t offset_bytes = 0;
};

// The placements of a group `m` of these views.
void expect_aliases(const std::vector<TensorView>& views, const std::vector<Expected>& expected) {
  StateDictBuilder builder;
  ASSERT_TRUE(builder.begin("m", NodeKind::kList));
  for (const TensorView& view : views) ASSERT_TRUE(builder.tensor(0, view));
  ASSERT_TRUE(builder.end());
  const Plan plan = plan_of(builder.finish().value());
  ASSERT_EQ(plan.placements.size(), expected.size());
  std::size_t stored = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    SCOPED_TRACE(i);
    EXPECT_EQ(plan.placements[i].alias_of, expected[i].alias_of);
    EXPECT_EQ(plan.placements[i].alias_offset_bytes, expected[i].offset_bytes);
    if (!expected[i].alias_of) {
      ++stored;
      EXPECT_EQ(plan.files[0].tensors[plan.placements[i].index].tensor, i);
    } else {
      EXPECT_EQ(plan.placements[i].index, plan.placements[*expected[i].alias_of].index);
    }
  }
  EXPECT_EQ(plan.files[0].tensors.size(), stored);
}

TEST(Plan, OrdersByElementSizeThenByTreeWithoutGaps) {
  std::vector<std::uint8_t> bytes(3);
  std::vector<float> floats(5);
  std::vector<double> doubles(2);
  std::vector<std::int32_t> integers(1);
  const StateDict state{{"m", StateDict{{"bytes", TensorView::of(bytes)},
                                        {"floats", TensorView::of(floats)},
                                        {"doubles", TensorView::of(doubles)},
                                        {"integers", TensorView::of(integers)}}}};
  const Plan plan = plan_of(state);
  ASSERT_EQ(plan.files.size(), 1u);
  const FilePlan& file = plan.files[0];
  ASSERT_EQ(file.tensors.size(), 4u);
  const std::vector<std::string> names = {"doubles", "floats", "integers", "bytes"};
  std::uint64_t offset = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(file.tensors[i].name, names[i]);
    EXPECT_EQ(file.tensors[i].offset, offset);
    offset += file.tensors[i].bytes;
  }
  EXPECT_EQ(file.data_bytes, 43u);
  EXPECT_EQ(file.group, "m");
  EXPECT_EQ(file.name, "m-00001-of-00001.safetensors");
  EXPECT_EQ(file.index_name, "m.safetensors.index.json");
  EXPECT_EQ(plan.data_bytes(), 43u);
  EXPECT_EQ(plan.file_bytes(), 43u + file.header.size());
}

TEST(Plan, TheHeaderDescribesTheFile) {
  std::vector<float> floats(6);
  const StateDict state{{"m", StateDict{{"w", TensorView::of(floats, {2, 3})},
                                        {"empty", TensorView::of(floats, {0, 6})}}}};
  const Plan plan = plan_of(state);
  const std::string& header = plan.files[0].header;
  EXPECT_EQ(header.size() % 4096, 0u);
  const auto parsed = format::parse_safetensors_header(
      std::as_bytes(std::span(header.data(), header.size())), plan.file_bytes());
  ASSERT_TRUE(parsed) << parsed.error().text();
  EXPECT_EQ(parsed->data_start, header.size());
  ASSERT_EQ(parsed->tensors.size(), 2u);
  EXPECT_EQ(parsed->tensors[0].name, "w");
  EXPECT_EQ(parsed->tensors[0].shape, (std::vector<std::uint64_t>{2, 3}));
}

TEST(Plan, AStateWithoutTensorsHasNoFiles) {
  EXPECT_TRUE(plan_of(StateDict{{"epoch", 3}}).files.empty());
  EXPECT_TRUE(plan_of(StateDict{}).files.empty());
}

TEST(Plan, EveryGroupIsAFile) {
  std::vector<float> floats(6);
  const StateDict state{{"model", StateDict{{"w", TensorView::of(floats)}}},
                        {"loose", TensorView::of(floats)},
                        {"optimizer", StateDict{{"w", TensorView::of(floats)}}}};
  const Plan plan = plan_of(state);
  ASSERT_EQ(plan.files.size(), 3u);
  for (std::uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(plan.placements[i].file, i);
    EXPECT_FALSE(plan.placements[i].alias_of) << "aliases across groups are stored in full";
  }
}

TEST(Plan, TiedWeightsAreStoredOnce) {
  std::vector<float> floats(12);
  expect_aliases({window(floats, 0, {12}), window(floats, 0, {12})}, {{}, {0, 0}});
  expect_aliases({window(floats, 0, {3, 4}), window(floats, 0, {12})}, {{}, {0, 0}});
}

TEST(Plan, UntyingIsSeenAtTheNextPlan) {
  std::vector<float> floats(12);
  std::vector<float> others(12);
  StateDict state{{"m", StateDict{{"a", TensorView::of(floats)}, {"b", TensorView::of(floats)}}}};
  EXPECT_TRUE(plan_of(state).placements[1].alias_of);
  state.tensors()[1] = TensorView::of(others);
  EXPECT_FALSE(plan_of(state).placements[1].alias_of);
}

TEST(Plan, ASliceOfRowsIsAnAliasOfItsParentInEitherOrder) {
  std::vector<float> floats(12);
  expect_aliases({window(floats, 0, {3, 4}), window(floats, 4, {2, 4})}, {{}, {0, 16}});
  expect_aliases({window(floats, 4, {4}), window(floats, 0, {3, 4}), window(floats, 11, {})},
                 {{1, 16}, {}, {1, 44}});
}

TEST(Plan, AliasesNeverPointToAliases) {
  std::vector<float> floats(16);
  expect_aliases({window(floats, 8, {4}), window(floats, 8, {8}), window(floats, 0, {16}),
                  window(floats, 9, {1})},
                 {{2, 32}, {2, 32}, {}, {2, 36}});
}

TEST(Plan, ARangeOfAnotherTypeIsAnAliasWhereItIsAligned) {
  std::vector<float> floats(8);
  TensorView halves = window(floats, 1, {4});
  halves.dtype = DType::kF16;
  halves.strides_bytes = {2};
  expect_aliases({window(floats, 0, {8}), halves}, {{}, {0, 4}});
  TensorView doubles = window(floats, 1, {2});
  doubles.dtype = DType::kF64;
  doubles.strides_bytes = {8};
  expect_aliases({window(floats, 0, {8}), doubles}, {{}, {}});
  expect_aliases({window(floats, 0, {8}), doubles, doubles}, {{}, {}, {1, 0}});
}

TEST(Plan, StridedViewsAreStoredInFull) {
  std::vector<float> floats(12);
  expect_aliases({window(floats, 0, {3, 4}), strided(floats, 0, {4, 3}, {1, 4}),
                  strided(floats, 0, {3, 2}, {4, 1}), strided(floats, 0, {3, 4}, {0, 1})},
                 {{}, {}, {}, {}});
}

TEST(Plan, EqualStridedViewsAreStoredOnce) {
  std::vector<float> floats(12);
  const TensorView transposed = strided(floats, 0, {4, 3}, {1, 4});
  const TensorView other_extent = strided(floats, 0, {4, 2}, {1, 4});
  expect_aliases({transposed, other_extent, transposed}, {{}, {}, {0, 0}});
  // The stride of a single element says nothing.
  expect_aliases({strided(floats, 0, {1, 4}, {7, 2}), strided(floats, 0, {1, 4}, {9, 2})},
                 {{}, {0, 0}});
}

TEST(Plan, OverlappingWindowsAreStoredInFull) {
  std::vector<float> floats(12);
  expect_aliases({window(floats, 0, {8}), window(floats, 4, {8})}, {{}, {}});
  // A range inside both belongs to the one that reaches further.
  expect_aliases({window(floats, 0, {8}), window(floats, 4, {8}), window(floats, 5, {2})},
                 {{}, {}, {1, 4}});
}

TEST(Plan, ConjugateAndNegativeViewsAreAliasesOnlyOfTheirLike) {
  std::vector<float> floats(12);
  TensorView negative = window(floats, 0, {12});
  negative.negative = true;
  expect_aliases({window(floats, 0, {12}), negative, negative}, {{}, {}, {1, 0}});
  TensorView part = negative;
  part.shape = {4};
  expect_aliases({negative, part}, {{}, {}});
}

TEST(Plan, EqualAddressesOnTwoDevicesAreTwoTensors) {
  std::vector<float> floats(12);
  TensorView second = window(floats, 0, {12});
  second.device = {"cuda", 1};
  TensorView first = second;
  first.device.index = 0;
  expect_aliases({window(floats, 0, {12}), first, second, second}, {{}, {}, {}, {2, 0}});
}

TEST(Plan, TensorsWithoutElementsAreStored) {
  std::vector<float> floats(12);
  expect_aliases({window(floats, 0, {12}), window(floats, 2, {0}), window(floats, 2, {0})},
                 {{}, {}, {}});
}

TEST(Plan, AStorageThatWasFreedIsReportedByKeyPathWithBothSizes) {
  std::vector<float> floats(12);
  StateDict state{{"model", StateDict{{"weight", TensorView::of(floats)}}}};
  state.tensors()[0].storage_bytes = 20;
  const auto plan = plan_files(state);
  ASSERT_FALSE(plan);
  EXPECT_EQ(plan.error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(plan.error().key_path, "model.weight");
  EXPECT_NE(plan.error().message.find("48"), std::string::npos) << plan.error().message;
  EXPECT_NE(plan.error().message.find("20"), std::string::npos) << plan.error().message;
}

TEST(Plan, AViewThatIsNotWhatTheStateWasBuiltWithIsRefused) {
  std::vector<float> floats(12);
  StateDict state{{"model", StateDict{{"weight", TensorView::of(floats)}}}};
  state.tensors()[0].shape = {6};
  EXPECT_EQ(plan_files(state).error().code, ErrorCode::kInvalidArgument);
  state.tensors().clear();
  EXPECT_EQ(plan_files(state).error().code, ErrorCode::kInvalidArgument);
}

// Whatever the aliases are, the bytes that they point to are the tensor's own.
TEST(Plan, EveryAliasPointsToItsOwnBytes) {
  std::mt19937_64 random(4);
  for (int round = 0; round < 300; ++round) {
    std::vector<float> floats(24);
    StateDictBuilder builder;
    ASSERT_TRUE(builder.begin("m", NodeKind::kList));
    const std::size_t count = 1 + random() % 12;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t first = random() % 20;
      const std::uint64_t extent = random() % (24 - first);
      TensorView view = window(floats, first, {extent});
      if (random() % 4 == 0 && extent > 1) view.strides_bytes = {0};
      view.negative = random() % 5 == 0;
      ASSERT_TRUE(builder.tensor(0, view));
    }
    ASSERT_TRUE(builder.end());
    const StateDict state = builder.finish().value();
    const Plan plan = plan_of(state);
    std::uint64_t expected_bytes = 0;
    for (std::uint32_t i = 0; i < count; ++i) {
      const Placement& placement = plan.placements[i];
      const TensorView& view = state.tensors()[i];
      if (!placement.alias_of) {
        expected_bytes += view.byte_count();
        continue;
      }
      ASSERT_FALSE(plan.placements[*placement.alias_of].alias_of);
      const TensorView& owner = state.tensors()[*placement.alias_of];
      ASSERT_EQ(view.negative, owner.negative);
      ASSERT_EQ(view.data, owner.data + placement.alias_offset_bytes);
      ASSERT_LE(placement.alias_offset_bytes + view.byte_count(), owner.byte_count());
      ASSERT_TRUE(owner.is_row_major() ||
                  (view.strides_bytes == owner.strides_bytes && view.shape == owner.shape));
    }
    ASSERT_EQ(plan.data_bytes(), expected_bytes);
  }
}

}  // namespace
}  // namespace strandline::staging
