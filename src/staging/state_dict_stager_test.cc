// What StateDictStager gives back: the same structure, aliases and geometry, in memory of its own
// that lives as long as anyone needs it.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <bit>
#include <complex>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <latch>
#include <optional>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "staging/stager_impl.h"
#include "strandline/shared_memory.h"
#include "strandline/stager.h"
#include "testing/checkpoint_fixture.h"
#include "testing/child_process.h"

namespace strandline::testing {
namespace {

using ::testing::HasSubstr;

constexpr std::uint64_t kMiB = 1 << 20;

StateDictStager stager_of(std::uint64_t host_bytes_max) {
  return must(StateDictStager::open({.host_bytes_max = host_bytes_max}));
}

StateDict one_tensor(std::vector<std::uint8_t>& bytes) {
  return StateDict{{"model", StateDict{{"w", TensorView::of(bytes)}}}};
}

std::uint64_t offset_of(const TensorView& view) {
  return static_cast<std::uint64_t>(view.data - view.storage_base);
}

TEST(StateDictStager, GivesTheSameStateInMemoryOfItsOwn) {
  Job job(3);
  StateDictStager stager = stager_of(kMiB);
  const StateDict staged = must(stager.stage(job.state()));
  const auto expected = content_of(job);
  EXPECT_EQ(content_of(staged), expected);
  job = Job(4);
  EXPECT_EQ(content_of(staged), expected);
  for (const TensorView& view : staged.tensors()) {
    EXPECT_TRUE(view.check()) << view.check().error().text();
    EXPECT_TRUE(view.writable);
    EXPECT_EQ(view.device, DeviceId());
  }
}

TEST(StateDictStager, AliasesAndViewsStayWhatTheyWere) {
  std::vector<float> weights(100);
  TensorView whole = TensorView::of(weights, {10, 10});
  TensorView row = whole;
  row.data += 30 * sizeof(float);
  row.shape = {10};
  row.strides_bytes = {4};
  TensorView transposed = whole;
  transposed.strides_bytes = {4, 40};
  StateDictStager stager = stager_of(kMiB);
  const StateDict staged = must(stager.stage(
      StateDict{{"row", row}, {"whole", whole}, {"tied", whole}, {"transposed", transposed}}));
  const auto& views = staged.tensors();
  for (const TensorView& view : views) EXPECT_EQ(view.storage_base, views[0].storage_base);
  EXPECT_EQ(views[0].storage_bytes, 400u);
  EXPECT_EQ(offset_of(views[0]), 120u);
  EXPECT_EQ(views[3].strides_bytes, transposed.strides_bytes);
  // A write through one is seen through all.
  const float value = 42;
  std::memcpy(views[0].data, &value, sizeof(value));
  EXPECT_EQ(std::memcmp(views[2].data + 120, &value, sizeof(value)), 0);
}

TEST(StateDictStager, AnyGeometryIsKeptByteForByte) {
  std::vector<float> numbers(60);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>(i);
  TensorView reversed = TensorView::of(numbers, {60});
  reversed.data += 59 * sizeof(float);
  reversed.strides_bytes = {-4};
  TensorView expanded = TensorView::of(numbers, {60});
  expanded.shape = {5, 3};
  expanded.strides_bytes = {0, 8};
  TensorView scalar = TensorView::of(numbers, {60});
  scalar.data += 28;
  scalar.shape = {};
  scalar.strides_bytes = {};
  TensorView empty = TensorView::row_major(nullptr, DType::kF64, {2, 0, 3});
  const StateDict state{
      {"reversed", reversed}, {"expanded", expanded}, {"scalar", scalar}, {"empty", empty}};
  StateDictStager stager = stager_of(kMiB);
  const StateDict staged = must(stager.stage(state));
  EXPECT_EQ(content_of(staged), content_of(state));
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(staged.tensors()[i].strides_bytes, state.tensors()[i].strides_bytes);
  }
  EXPECT_EQ(staged.tensors()[3].data, nullptr);
  EXPECT_EQ(offset_of(staged.tensors()[0]), 236u);
}

TEST(StateDictStager, ConjugateAndNegativeBitsStayAndTheBytesAreNotResolved) {
  std::vector<std::complex<float>> storage = {{1, 2}, {-3, 4}};
  TensorView conjugate = TensorView::row_major(storage.data(), DType::kC64, {2});
  conjugate.conjugate = true;
  TensorView negative = conjugate;
  negative.conjugate = false;
  negative.negative = true;
  StateDictStager stager = stager_of(kMiB);
  const StateDict staged =
      must(stager.stage(StateDict{{"conjugate", conjugate}, {"negative", negative}}));
  EXPECT_TRUE(staged.tensors()[0].conjugate);
  EXPECT_FALSE(staged.tensors()[0].negative);
  EXPECT_TRUE(staged.tensors()[1].negative);
  EXPECT_EQ(std::memcmp(staged.tensors()[0].data, storage.data(), 16), 0);
  EXPECT_EQ(staged.tensors()[1].data, staged.tensors()[0].data);
}

TEST(StateDictStager, AViewOfAKibibyteOfAGibibyteStagesAtMostAPage) {
  constexpr std::uint64_t kGiB = 1ull << 30;
  void* mapped = ::mmap(nullptr, kGiB, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(mapped, MAP_FAILED);
  auto* const base = static_cast<std::byte*>(mapped);
  TensorView view = TensorView::row_major(base + 493'827'156, DType::kF32, {256});
  view.storage_base = base;
  view.storage_bytes = kGiB;
  std::memset(view.data, 7, 1024);
  StateDictStager stager = stager_of(kMiB);
  const StateDict staged = must(stager.stage(StateDict{{"w", view}}));
  ::munmap(mapped, kGiB);
  EXPECT_EQ(stager.host_bytes_in_use(), 4096u);
  EXPECT_EQ(offset_of(staged.tensors()[0]), 0u);
  EXPECT_EQ(staged.tensors()[0].storage_bytes, 1024u);
  for (const std::byte byte : bytes_of(staged.tensors()[0])) ASSERT_EQ(byte, std::byte{7});
}

TEST(StateDictStager, AStateWithoutTensorsKeepsItsValues) {
  StateDictStager stager = stager_of(0);
  const StateDict state{{"epoch", 3}, {"name", "run"}};
  EXPECT_EQ(content_of(must(stager.stage(state))), content_of(state));
  EXPECT_EQ(stager.host_bytes_in_use(), 0u);
}

TEST(StateDictStager, AResultOutlivesItsSuccessorsTheStagerAndItsOtherTensors) {
  std::vector<std::uint8_t> one(5000, 1);
  std::vector<std::uint8_t> two(5000, 2);
  const StateDict state{{"one", TensorView::of(one)}, {"two", TensorView::of(two)}};
  std::optional<StateDictStager> stager(stager_of(kMiB));
  TensorView kept;
  {
    const StateDict staged = must(stager->stage(state));
    kept = staged.tensors()[1];
  }
  for (int i = 0; i < 20; ++i) {
    two.assign(two.size(), static_cast<std::uint8_t>(i + 10));
    const StateDict later = must(stager->stage(state));
    ASSERT_EQ(bytes_of(later.tensors()[1])[0], static_cast<std::byte>(i + 10));
  }
  stager->close();
  stager.reset();
  for (const std::byte byte : bytes_of(kept)) ASSERT_EQ(byte, std::byte{2});
}

TEST(StateDictStager, MemoryIsUsedAgainOnceItsResultIsDropped) {
  std::vector<std::uint8_t> bytes(100'000, 1);
  StateDictStager stager = stager_of(kMiB);
  StateDict first = must(stager.stage(one_tensor(bytes)));
  const StateDict second = must(stager.stage(one_tensor(bytes)));
  std::byte* const where = first.tensors()[0].data;
  EXPECT_NE(second.tensors()[0].data, where);
  first = StateDict();
  const StateDict third = must(stager.stage(one_tensor(bytes)));
  EXPECT_EQ(third.tensors()[0].data, where);
}

TEST(StateDictStager, WithOneGenerationsMemoryEveryDropMakesRoomForTheNext) {
  std::vector<std::uint8_t> bytes(3 * kMiB, 1);
  StateDictStager stager =
      must(StateDictStager::open({.host_bytes_max = 3 * kMiB, .copy_threads = 3}));
  // Workers that still look for work must not hold on to the memory.
  for (int i = 0; i < 300; ++i) {
    const Result<StateDict> staged = stager.stage(one_tensor(bytes));
    ASSERT_TRUE(staged) << "round " << i << ": " << staged.error().text();
  }
}

TEST(StateDictStager, AStateThatDoesNotFitBesideHeldResultsFailsNamingAllThree) {
  std::vector<std::uint8_t> bytes(300'000);
  StateDictStager stager = stager_of(kMiB);
  std::vector<StateDict> held;
  for (int i = 0; i < 3; ++i) held.push_back(must(stager.stage(one_tensor(bytes))));
  const Error error = must_fail(stager.stage(one_tensor(bytes)));
  EXPECT_EQ(error.code, ErrorCode::kMemoryLimit);
  EXPECT_THAT(error.message, HasSubstr("303104"));   // The state, in pages.
  EXPECT_THAT(error.message, HasSubstr("1048576"));  // The ceiling.
  EXPECT_THAT(error.message, HasSubstr("909312"));   // What is held.
  held.pop_back();
  EXPECT_TRUE(stager.stage(one_tensor(bytes)));
}

TEST(StateDictStager, AStateLargerThanTheCeilingFailsNamingBoth) {
  std::vector<std::uint8_t> bytes(2 * kMiB);
  StateDictStager stager = stager_of(kMiB);
  const Error error = must_fail(stager.stage(one_tensor(bytes)));
  EXPECT_EQ(error.code, ErrorCode::kMemoryLimit);
  EXPECT_THAT(error.message, HasSubstr("2097152"));
  EXPECT_THAT(error.message, HasSubstr("1048576"));
}

TEST(StateDictStager, WithoutACeilingManyResultsAreHeldAtOnce) {
  std::vector<std::uint8_t> bytes(300'000);
  StateDictStager stager = must(StateDictStager::open({}));
  std::vector<StateDict> held;
  for (int i = 0; i < 10; ++i) held.push_back(must(stager.stage(one_tensor(bytes))));
  EXPECT_GE(stager.host_bytes_in_use(), 3'000'000u);
}

TEST(StateDictStager, NamesTheTensorThatCannotBeStagedAndStagesTheNextState) {
  std::vector<std::uint8_t> bytes(10);
  TensorView wrong = TensorView::of(bytes);
  wrong.storage_bytes = 9;
  TensorView foreign = TensorView::of(bytes);
  foreign.device.kind = "tpu";
  StateDictStager stager = stager_of(kMiB);
  Error error = must_fail(stager.stage(StateDict{{"m", StateDict{{"w", wrong}}}}));
  EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(error.key_path, "m.w");
  error = must_fail(stager.stage(StateDict{{"m", StateDict{{"x", foreign}}}}));
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  EXPECT_EQ(error.key_path, "m.x");
  EXPECT_THAT(error.message, HasSubstr("tpu"));
  error = must_fail(stager.stage(StateDict{{"twice", 1}, {"twice", 2}}));
  EXPECT_EQ(error.key_path, "twice");
  EXPECT_TRUE(stager.stage(one_tensor(bytes)));
}

TEST(StateDictStager, OptionsThatCannotBeAreRefused) {
  EXPECT_EQ(must_fail(StateDictStager::open({.copy_threads = 257})).code,
            ErrorCode::kInvalidArgument);
  const Error error =
      must_fail(StateDictStager::open({.device_wait = std::chrono::milliseconds(-1)}));
  EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(error.message, HasSubstr("device_wait"));
}

TEST(StateDictStager, AfterCloseItSaysSo) {
  std::vector<std::uint8_t> bytes(10, 3);
  StateDictStager stager = stager_of(kMiB);
  const StateDict staged = must(stager.stage(one_tensor(bytes)));
  static_cast<void>(must(stager.stage(one_tensor(bytes))));  // Kept for the next.
  EXPECT_EQ(stager.host_bytes_mapped(), 2 * 4096u);
  stager.close();
  stager.close();
  EXPECT_EQ(stager.host_bytes_mapped(), 4096u) << "what is held";
  const Error error = must_fail(stager.stage(one_tensor(bytes)));
  EXPECT_EQ(error.code, ErrorCode::kUnavailable);
  EXPECT_THAT(error.message, HasSubstr("closed"));
  EXPECT_EQ(bytes_of(staged.tensors()[0]), std::vector<std::byte>(10, std::byte{3}));
}

TEST(StateDictStager, MovesTakeTheirResultsAlong) {
  std::vector<std::uint8_t> bytes(10, 3);
  StateDictStager one = stager_of(kMiB);
  const StateDict staged = must(one.stage(one_tensor(bytes)));
  StateDictStager two = std::move(one);
  EXPECT_EQ(two.host_bytes_in_use(), 4096u);
  two = stager_of(kMiB);
  EXPECT_EQ(two.host_bytes_in_use(), 0u);
  EXPECT_TRUE(two.stage(one_tensor(bytes)));
}

TEST(StateDictStager, IsDeadInAForkedChildWhichMayOpenItsOwn) {
  std::vector<std::uint8_t> bytes(10, 3);
  auto stager = std::make_unique<StateDictStager>(stager_of(kMiB));
  ChildProcess child([&]() -> std::string {
    const Result<StateDict> staged = stager->stage(one_tensor(bytes));
    if (staged || staged.error().code != ErrorCode::kUnavailable) return "it stages";
    stager->close();
    if (stager->host_bytes_in_use() != 0) return "it has memory";
    stager.reset();
    // ThreadSanitizer permits no new threads after a fork.
    StateDictStager own = must(StateDictStager::open({.host_bytes_max = kMiB, .copy_threads = 0}));
    return own.stage(one_tensor(bytes)) ? "as it should be" : "cannot open its own";
  });
  EXPECT_EQ(child.wait(), "as it should be");
  EXPECT_TRUE(stager->stage(one_tensor(bytes)));
}

std::size_t entries(const char* directory) {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory)) ++count;
  return count;
}

std::size_t mappings() {
  std::ifstream maps("/proc/self/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);) ++count;
  return count;
}

TEST(StateDictStager, SharedResultsAreSeenByAnotherProcessAndPrivateOnesCannotBeShared) {
  std::vector<std::uint8_t> bytes(10'000, 3);
  StateDictStager stager =
      must(StateDictStager::open({.share_memory = true, .host_bytes_max = kMiB}));
  const StateDict staged = must(stager.stage(one_tensor(bytes)));
  std::byte* const data = staged.tensors()[0].data;
  const SharedRange range = must(share(data, 10'000));
  ChildProcess child([&]() -> std::string {
    const Result<AttachedMemory> attached = attach(range);
    if (!attached) return attached.error().text();
    if (attached->data[9'999] != std::byte{3}) return "reads something else";
    attached->data[0] = std::byte{42};
    return "as it should be";
  });
  EXPECT_EQ(child.wait(), "as it should be");
  EXPECT_EQ(data[0], std::byte{42});
  StateDictStager other = stager_of(kMiB);
  const StateDict alone = must(other.stage(one_tensor(bytes)));
  EXPECT_EQ(must_fail(share(alone.tensors()[0].data, 10'000)).code, ErrorCode::kInvalidArgument);
}

class ManyStagings : public ::testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(PrivateAndShared, ManyStagings, ::testing::Bool());

TEST_P(ManyStagings, LeaveDescriptorsAndMappingsAsTheyWere) {
  std::vector<std::uint8_t> large(200'000);
  std::vector<std::uint8_t> small(5'000);
  StateDictStager stager =
      must(StateDictStager::open({.share_memory = GetParam(), .host_bytes_max = 2 * kMiB}));
  StateDict held;
  std::size_t descriptors = 0;
  std::size_t maps = 0;
  std::uint64_t mapped = 0;
  for (int i = 0; i < 510; ++i) {
    // Sizes change, and a result is held over the next staging.
    held = must(stager.stage(one_tensor(i % 3 == 0 ? small : large)));
    if (i < 9 || i % 3 != 0) continue;
    if (descriptors == 0) {
      descriptors = entries("/proc/self/fd");
      maps = mappings();
      mapped = stager.host_bytes_mapped();
    }
    ASSERT_EQ(entries("/proc/self/fd"), descriptors);
    ASSERT_LE(mappings(), maps + 2) << "heap arenas may come";
    ASSERT_EQ(stager.host_bytes_mapped(), mapped);
  }
}

TEST(StateDictStager, ThreadsStageAtTheSameTimeWithoutDisturbingEachOther) {
  StateDictStager stager = must(StateDictStager::open({.copy_threads = 2}));
  std::vector<std::thread> threads;
  std::latch start(4);
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937_64 random(static_cast<std::uint64_t>(thread));
      std::vector<std::uint8_t> bytes(300'000 + random() % 100'000);
      start.arrive_and_wait();
      for (int round = 0; round < 25; ++round) {
        std::memset(bytes.data(), static_cast<int>(random() % 256), bytes.size());
        const std::byte expected{bytes[0]};
        const Result<StateDict> staged = stager.stage(one_tensor(bytes));
        ASSERT_TRUE(staged) << staged.error().text();
        std::memset(bytes.data(), static_cast<int>(random() % 256), bytes.size());
        const std::byte* const data = staged->tensors()[0].data;
        ASSERT_EQ(data[0], expected);
        ASSERT_EQ(std::memcmp(data, data + 1, bytes.size() - 1), 0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(StateDictStager, ClosingWhileOthersStageWaitsForThemAndRefusesTheRest) {
  for (int round = 0; round < 50; ++round) {
    std::vector<std::uint8_t> bytes(100'000, 7);
    StateDictStager stager = must(StateDictStager::open({.copy_threads = 1}));
    std::latch start(3);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 2; ++thread) {
      threads.emplace_back([&] {
        start.arrive_and_wait();
        for (int i = 0; i < 10; ++i) {
          const Result<StateDict> staged = stager.stage(one_tensor(bytes));
          if (!staged) {
            EXPECT_EQ(staged.error().code, ErrorCode::kUnavailable);
            return;
          }
          EXPECT_EQ(bytes_of(staged->tensors()[0])[99'999], std::byte{7});
        }
      });
    }
    start.arrive_and_wait();
    stager.close();
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace
}  // namespace strandline::testing
