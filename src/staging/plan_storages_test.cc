// Where storages go: hulls, offsets, alignment, what belongs together and what does not.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "staging/plan.h"
#include "testing/checkpoint_fixture.h"

namespace strandline::staging {
namespace {

using ::testing::ElementsAre;
using testing::must;
using testing::must_fail;

// A view of `count` elements of a buffer from byte `first` on.
TensorView part(std::vector<std::uint8_t>& storage, std::uint64_t first, std::uint64_t count,
                DType dtype = DType::kU8) {
  TensorView view = TensorView::row_major(storage.data() + first, dtype, {count});
  view.storage_base = reinterpret_cast<const std::byte*>(storage.data());
  view.storage_bytes = storage.size();
  return view;
}

std::vector<std::uint64_t> offsets(const StoragePlan& plan) {
  std::vector<std::uint64_t> result;
  for (const ExtentPlace& place : plan.plan->places) result.push_back(place.offset_bytes);
  return result;
}

TEST(PlanStorages, OffsetsStayWhereTheWholeStorageIsReached) {
  std::vector<std::uint8_t> storage(1000);
  const StateDict state{{"middle", part(storage, 400, 100)},
                        {"front", part(storage, 0, 500)},
                        {"back", part(storage, 500, 500)}};
  const StoragePlan plan = must(plan_storages(state));
  ASSERT_EQ(plan.extents.size(), 1u);
  EXPECT_EQ(plan.extents[0].byte_count(), 1000u);
  EXPECT_THAT(offsets(plan), ElementsAre(400, 0, 500));
}

TEST(PlanStorages, OnlyTheHullOfWhatIsReachedIsStaged) {
  std::vector<std::uint8_t> storage(1000);
  const StateDict state{{"a", part(storage, 300, 50)}, {"b", part(storage, 700, 20)}};
  const StoragePlan plan = must(plan_storages(state));
  ASSERT_EQ(plan.extents.size(), 1u);
  EXPECT_EQ(plan.extents[0].data, reinterpret_cast<std::byte*>(storage.data()) + 288);
  EXPECT_EQ(plan.extents[0].byte_count(), 432u);
  EXPECT_THAT(offsets(plan), ElementsAre(12, 412));
}

TEST(PlanStorages, ElementsStayAtMultiplesOfTheirSize) {
  std::vector<std::uint8_t> storage(1000);
  const StateDict state{{"bytes", part(storage, 101, 3)},
                        {"floats", part(storage, 104, 2, DType::kF32)},
                        {"complex", part(storage, 112, 2, DType::kC64)}};
  const StoragePlan plan = must(plan_storages(state));
  EXPECT_THAT(offsets(plan), ElementsAre(5, 8, 16));  // Bytes 96 to 128.
  EXPECT_EQ(plan.plan->files[0].data_bytes, 32u);
  // Tensors that lie in the same place begin at their extent's beginning.
  const TensorView floats = part(storage, 104, 2, DType::kF32);
  EXPECT_THAT(offsets(must(plan_storages(StateDict{{"floats", floats}, {"tied", floats}}))),
              ElementsAre(0, 0));
}

TEST(PlanStorages, ElementsThatAreHandedOverAsBytesStayAtMultiplesOfTheirSize) {
  std::vector<std::uint8_t> storage(1000);
  TensorView complex = part(storage, 112, 2);  // Two elements of 16 bytes.
  complex.shape = {2, 16};
  complex.strides_bytes = {16, 1};
  complex.storage_bytes = 1000;
  const StateDict state{{"complex", complex}, {"bytes", part(storage, 101, 3)}};
  EXPECT_THAT(offsets(must(plan_storages(state))), ElementsAre(16, 5));
}

TEST(PlanStorages, EveryStorageHasItsOwnAlignedExtent) {
  std::vector<std::uint8_t> one(65);
  std::vector<std::uint8_t> two(1);
  std::vector<std::uint8_t> three(64);
  const StateDict state{{"one", part(one, 0, 65)},
                        {"two", part(two, 0, 1)},
                        {"again", part(one, 60, 5)},
                        {"three", part(three, 0, 64)}};
  const StoragePlan storages = must(plan_storages(state));
  const Plan& plan = *storages.plan;
  ASSERT_EQ(plan.files.size(), 1u);
  const FilePlan& file = plan.files[0];
  ASSERT_EQ(file.tensors.size(), 3u);
  EXPECT_EQ(file.tensors[0].offset, 0u);
  EXPECT_EQ(file.tensors[1].offset, 128u);
  EXPECT_EQ(file.tensors[2].offset, 192u);
  EXPECT_EQ(file.tensors[2].tensor, 3u) << "named by its first tensor";
  EXPECT_EQ(file.file_bytes(), 256u);
  EXPECT_EQ(plan.places[2].extent, 0u);
}

TEST(PlanStorages, TheSameAddressOnAnotherDeviceIsAnotherStorage) {
  std::vector<std::uint8_t> storage(10);
  TensorView on_device = part(storage, 0, 10);
  on_device.device = {.kind = "fake", .index = 0};
  TensorView on_second = part(storage, 0, 10);
  on_second.device = {.kind = "fake", .index = 1};
  const StateDict state{
      {"host", part(storage, 0, 10)}, {"device", on_device}, {"second", on_second}};
  const StoragePlan plan = must(plan_storages(state));
  ASSERT_EQ(plan.extents.size(), 3u);
  EXPECT_EQ(plan.extents[2].device, on_second.device);
}

TEST(PlanStorages, StoragesThatOverlapStayApart) {
  std::vector<std::uint8_t> storage(100);
  TensorView inner = TensorView::row_major(storage.data() + 50, DType::kU8, {20});
  const StateDict state{{"outer", part(storage, 0, 100)}, {"inner", inner}};
  const StoragePlan plan = must(plan_storages(state));
  EXPECT_EQ(plan.extents.size(), 2u);
  EXPECT_THAT(offsets(plan), ElementsAre(0, 0));
}

TEST(PlanStorages, NegativeStridesReachBackwardsAndExpandedOnesNowhere) {
  std::vector<std::uint8_t> storage(100);
  TensorView reversed = part(storage, 79, 10);
  reversed.strides_bytes = {-2};
  TensorView expanded = part(storage, 70, 1);
  expanded.shape = {1000, 2};
  expanded.strides_bytes = {0, 1};
  const StoragePlan plan =
      must(plan_storages(StateDict{{"reversed", reversed}, {"expanded", expanded}}));
  EXPECT_EQ(plan.extents[0].byte_count(), 32u);  // Bytes 61 to 79 and what aligns them.
  EXPECT_THAT(offsets(plan), ElementsAre(31, 22));
  EXPECT_THAT(offsets(must(plan_storages(StateDict{{"reversed", reversed}}))), ElementsAre(18));
}

TEST(PlanStorages, TensorsWithoutElementsTakeNothing) {
  std::vector<std::uint8_t> storage(100);
  std::vector<std::uint8_t> other(100);
  TensorView beside = part(storage, 20, 0);
  TensorView outside = part(storage, 90, 0);
  const StateDict state{{"null", TensorView::row_major(nullptr, DType::kF32, {0, 3})},
                        {"nobody", part(other, 50, 0)},
                        {"beside", beside},
                        {"outside", outside},
                        {"full", part(storage, 10, 50)}};
  const StoragePlan plan = must(plan_storages(state));
  ASSERT_EQ(plan.extents.size(), 1u);
  EXPECT_EQ(plan.extents[0].byte_count(), 50u);
  EXPECT_FALSE(plan.plan->places[0].extent);
  EXPECT_FALSE(plan.plan->places[1].extent);
  EXPECT_EQ(plan.plan->places[2].extent, 0u);
  EXPECT_THAT(offsets(plan), ElementsAre(0, 0, 10, 0, 0));
}

TEST(PlanStorages, AStateWithoutBytesHasNoFile) {
  EXPECT_TRUE(must(plan_storages(StateDict{{"epoch", 3}})).plan->files.empty());
  std::vector<float> nothing;
  const StoragePlan plan = must(plan_storages(StateDict{{"nothing", TensorView::of(nothing)}}));
  EXPECT_TRUE(plan.plan->files.empty());
  EXPECT_EQ(plan.plan->places.size(), 1u);
}

TEST(PlanStorages, AnExtentKeepsAliveWhatItsTensorsDo) {
  std::vector<std::uint8_t> storage(100);
  auto one = std::make_shared<int>(1);
  auto two = std::make_shared<int>(2);
  TensorView a = part(storage, 0, 10);
  a.keep_alive = one;
  TensorView b = part(storage, 10, 10);
  b.keep_alive = two;
  {
    const StoragePlan plan = must(plan_storages(StateDict{{"a", a}, {"b", b}, {"c", a}}));
    a.keep_alive.reset();
    b.keep_alive.reset();
    EXPECT_GT(one.use_count(), 1);
    EXPECT_GT(two.use_count(), 1);
  }
  EXPECT_EQ(one.use_count(), 1);
  EXPECT_EQ(two.use_count(), 1);
}

TEST(PlanStorages, EqualStatesGiveEqualPlansWhereverTheirMemoryLies) {
  std::vector<std::vector<std::uint8_t>> storages(8, std::vector<std::uint8_t>(100));
  std::vector<std::uint64_t> seen;
  for (const auto& order : {std::vector{0, 1, 2, 3}, std::vector{7, 6, 5, 4}}) {
    StateDictBuilder builder;
    for (const int i : order) {
      auto& storage = storages[static_cast<std::size_t>(i)];
      ASSERT_TRUE(builder.tensor(builder.path_text(Key(i)),
                                 part(storage, 10, 10 * static_cast<std::uint64_t>(i % 4 + 1))));
      ASSERT_TRUE(builder.tensor(builder.path_text(Key(i)) + "x", part(storage, 15, 2)));
    }
    const StoragePlan plan = must(plan_storages(must(builder.finish())));
    for (const ExtentPlace& place : plan.plan->places) {
      seen.push_back(place.extent.value() * 1000 + place.offset_bytes);
    }
  }
  EXPECT_TRUE(std::equal(seen.begin(), seen.begin() + 8, seen.begin() + 8));
}

TEST(PlanStorages, ATensorOutsideItsStorageIsRefusedWithItsPath) {
  std::vector<std::uint8_t> storage(100);
  TensorView view = part(storage, 90, 10);
  view.storage_bytes = 99;
  const Error error =
      must_fail(plan_storages(StateDict{{"model", StateDict{{"w", std::move(view)}}}}));
  EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(error.key_path, "model.w");
  EXPECT_THAT(error.message, ::testing::HasSubstr("cannot stage 'model.w'"));
}

TEST(PlanStorages, ViewsOfOneStorageOnTwoStreamsAreRefused) {
  std::vector<std::uint8_t> storage(100);
  TensorView one = part(storage, 0, 10);
  one.device = {.kind = "fake", .index = 0};
  one.stream = 7;
  TensorView two = one;
  two.stream = 8;
  const Error error = must_fail(plan_storages(StateDict{{"one", one}, {"two", two}}));
  EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(error.key_path, "two");
  EXPECT_THAT(error.message, ::testing::HasSubstr("'one'"));
}

TEST(PlanStorages, StoragesThatTogetherOverflowAreRefused) {
  StateDictBuilder builder;
  std::vector<std::uint8_t> anchor(4);
  for (int i = 0; i < 4; ++i) {
    TensorView view = TensorView::row_major(anchor.data() + i, DType::kU8, {1ull << 62});
    ASSERT_TRUE(builder.tensor(std::to_string(i), view));
  }
  EXPECT_EQ(must_fail(plan_storages(must(builder.finish()))).code, ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace strandline::staging
