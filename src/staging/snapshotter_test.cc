// From views to snapshots: what is copied, when take() returns, what happens when things fail.
//
// The reference for a snapshot's bytes is made from the plan and the host device, one tensor at a
// time; the reference for its digests from those bytes. Devices that finish late are fakes that the
// test completes.

#include "staging/snapshotter.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <latch>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/result_macros.h"
#include "device/host_device.h"
#include "testing/fake_device.h"
#include "testing/manual_executor.h"

namespace strandline::staging {
namespace {

using base::Clock;

constexpr std::uint64_t kMiB = 1 << 20;
constexpr Clock::Instant kLongAgo{};

Clock::Instant soon() { return std::chrono::steady_clock::now() + std::chrono::seconds(60); }

std::vector<std::uint8_t> random_bytes(std::size_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::uint8_t> bytes(count);
  for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
  return bytes;
}

TensorView on_fake_device(std::vector<std::uint8_t>& bytes) {
  TensorView view = TensorView::of(bytes);
  view.device.kind = "fake";
  return view;
}

// What the files of a snapshot must hold.
std::vector<std::vector<std::byte>> expected_files(const StateDict& state, const Plan& plan) {
  std::vector<std::vector<std::byte>> files;
  device::HostDevice host;
  for (const FilePlan& file : plan.files) {
    std::vector<std::byte> bytes(file.file_bytes());
    std::memcpy(bytes.data(), file.header.data(), file.header.size());
    for (const PlacedTensor& tensor : file.tensors) {
      host.copy_to_host_async(
          state.tensors()[tensor.tensor], 0,
          std::span(bytes).subspan(file.header.size() + tensor.offset, tensor.bytes),
          [](Status status) { EXPECT_TRUE(status); });
    }
    files.push_back(std::move(bytes));
  }
  return files;
}

// What the files of a snapshot hold; releases each segment after reading it.
Result<std::vector<std::vector<std::byte>>> read_files(Snapshot& snapshot,
                                                       Clock::Instant deadline) {
  std::vector<std::vector<std::byte>> files(snapshot.plan().files.size());
  for (std::size_t i = 0; i < snapshot.segments().size(); ++i) {
    const Segment& segment = snapshot.segments()[i];
    STRANDLINE_ASSIGN_OR_RETURN(const std::span<const std::byte> bytes,
                                snapshot.wait_segment(i, deadline));
    EXPECT_EQ(segment.file_offset, files[segment.file].size());
    EXPECT_EQ(segment.file_offset % 4096, 0u);
    EXPECT_EQ(segment.bytes, bytes.size());
    files[segment.file].insert(files[segment.file].end(), bytes.begin(), bytes.end());
    snapshot.release_segment(i);
  }
  return files;
}

void expect_digests(const Snapshot& snapshot, const std::vector<std::vector<std::byte>>& files) {
  for (std::uint32_t file = 0; file < files.size(); ++file) {
    const FilePlan& plan = snapshot.plan().files[file];
    for (std::uint32_t index = 0; index < plan.tensors.size(); ++index) {
      const auto bytes =
          std::span(files[file])
              .subspan(plan.header.size() + plan.tensors[index].offset, plan.tensors[index].bytes);
      const auto& digests = snapshot.digests(file, index);
      ASSERT_EQ(digests.size(), format::digest_chunk_count(bytes.size()));
      for (std::size_t chunk = 0; chunk < digests.size(); ++chunk) {
        const std::uint64_t begin = chunk * format::kDigestChunkBytes;
        const auto part = bytes.subspan(
            begin, std::min<std::uint64_t>(format::kDigestChunkBytes, bytes.size() - begin));
        ASSERT_EQ(digests[chunk], format::digest_of(part)) << "file " << file << " " << index;
      }
    }
  }
}

// A state with many shapes: large, small, strided, expanded, empty, tied, plain values.
struct Model {
  std::vector<std::uint8_t> large = random_bytes(2 * kMiB + 12345, 1);
  std::vector<std::uint8_t> matrix = random_bytes(300 * 500 * 4, 2);
  std::vector<std::vector<std::uint8_t>> small;

  Model() {
    for (std::uint64_t i = 0; i < 200; ++i) small.push_back(random_bytes(1 + i * 7, 10 + i));
  }
  StateDict state() {
    StateDictBuilder builder;
    EXPECT_TRUE(builder.begin("model", NodeKind::kDict));
    EXPECT_TRUE(builder.tensor("large", TensorView::of(large)));
    EXPECT_TRUE(builder.tensor("tied", TensorView::of(large)));
    TensorView transposed = TensorView::row_major(matrix.data(), DType::kF32, {500, 300});
    transposed.strides_bytes = {4, 2000};
    transposed.negative = true;
    EXPECT_TRUE(builder.tensor("transposed", transposed));
    TensorView expanded = TensorView::row_major(matrix.data(), DType::kF32, {9, 500});
    expanded.strides_bytes = {0, 4};
    expanded.storage_bytes = matrix.size();
    EXPECT_TRUE(builder.tensor("expanded", expanded));
    EXPECT_TRUE(builder.tensor("empty", TensorView::row_major(nullptr, DType::kF32, {0, 3})));
    EXPECT_TRUE(builder.end());
    EXPECT_TRUE(builder.begin("optimizer", NodeKind::kList));
    for (auto& bytes : small) EXPECT_TRUE(builder.tensor(0, TensorView::of(bytes)));
    EXPECT_TRUE(builder.value(0, Value(0.1)));
    EXPECT_TRUE(builder.end());
    return builder.finish().value();
  }
};

class SnapshotterTest : public ::testing::Test {
 protected:
  SnapshotterTest() : fake_(std::make_shared<testing::FakeDevice>()) { devices_.add(fake_); }

  std::unique_ptr<Snapshotter> make(std::uint64_t host_bytes_max,
                                    base::Executor* workers = nullptr) {
    Snapshotter::Options options;
    options.slab.host_bytes_max = host_bytes_max;
    return std::make_unique<Snapshotter>(std::move(options), devices_, workers, clock_);
  }

  std::shared_ptr<testing::FakeDevice> fake_;
  device::Registry devices_;
  base::SystemClock clock_;
};

TakeOptions until(Clock::Instant deadline) {
  TakeOptions options;
  options.deadline = deadline;
  return options;
}

// Without patience with devices and the snapshot's own consumer.
TakeOptions impatient() {
  TakeOptions options = until(soon());
  options.wave_wait = std::chrono::milliseconds(0);
  return options;
}

TEST_F(SnapshotterTest, ASnapshotHoldsEveryByteAndItsDigests) {
  Model model;
  const StateDict state = model.state();
  const auto workers = base::ThreadExecutor::start(3, 16, "copy").value();
  for (base::Executor* executor :
       {static_cast<base::Executor*>(nullptr), static_cast<base::Executor*>(workers.get())}) {
    const auto snapshotter = make(64 * kMiB, executor);
    TakeTimings timings;
    const auto snapshot = snapshotter->take(state, until(soon()), &timings);
    ASSERT_TRUE(snapshot) << snapshot.error().text();
    EXPECT_FALSE((*snapshot)->in_waves());
    EXPECT_EQ((*snapshot)->segments().size(), 2u);
    EXPECT_EQ((*snapshot)->bytes_staged(), (*snapshot)->plan().data_bytes());
    EXPECT_GT(timings.copy_ms, 0);
    const auto files = read_files(**snapshot, kLongAgo);
    ASSERT_TRUE(files);
    EXPECT_EQ(*files, expected_files(state, (*snapshot)->plan()));
    expect_digests(**snapshot, *files);
  }
}

TEST_F(SnapshotterTest, AStateWithoutTensorsIsASnapshotWithoutFiles) {
  const auto snapshotter = make(0);
  bool started = false;
  TakeOptions options = until(soon());
  options.started = [&](const std::shared_ptr<Snapshot>&) {
    started = true;
    return Status();
  };
  const auto snapshot = snapshotter->take(StateDict{{"epoch", 3}}, options, nullptr);
  ASSERT_TRUE(snapshot);
  EXPECT_TRUE(started);
  EXPECT_TRUE((*snapshot)->segments().empty());
}

TEST_F(SnapshotterTest, WhatIsChangedAfterwardsIsNotInTheSnapshot) {
  Model model;
  const StateDict state = model.state();
  const auto snapshotter = make(64 * kMiB);
  const auto snapshot = snapshotter->take(state, until(soon()), nullptr);
  ASSERT_TRUE(snapshot);
  const auto expected = expected_files(state, (*snapshot)->plan());
  model.large.assign(model.large.size(), 0);
  model.matrix.assign(model.matrix.size(), 0);
  EXPECT_EQ(read_files(**snapshot, kLongAgo).value(), expected);
}

TEST_F(SnapshotterTest, AHeldSnapshotIsNeverOverwrittenByLaterOnes) {
  Model model;
  const StateDict state = model.state();
  const auto snapshotter = make(64 * kMiB);
  const auto held = snapshotter->take(state, until(soon()), nullptr);
  ASSERT_TRUE(held);
  const auto expected = expected_files(state, (*held)->plan());
  for (int generation = 0; generation < 8; ++generation) {
    for (auto& byte : model.large) byte = static_cast<std::uint8_t>(byte + 1);
    const auto later = snapshotter->take(state, until(soon()), nullptr);
    ASSERT_TRUE(later);
    ASSERT_EQ(read_files(**later, kLongAgo).value(), expected_files(state, (*later)->plan()));
  }
  const auto files = read_files(**held, kLongAgo);
  EXPECT_EQ(files.value(), expected);
  expect_digests(**held, *files);
}

TEST_F(SnapshotterTest, AnUnknownDeviceIsRefusedWithTheKeyPath) {
  std::vector<std::uint8_t> bytes(10);
  TensorView view = TensorView::of(bytes);
  view.device.kind = "tpu";
  const StateDict state{{"model", StateDict{{"w", view}}}};
  const auto snapshot = make(kMiB)->take(state, until(soon()), nullptr);
  ASSERT_FALSE(snapshot);
  EXPECT_EQ(snapshot.error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(snapshot.error().key_path, "model.w");
  EXPECT_NE(snapshot.error().message.find("tpu"), std::string::npos);
}

TEST_F(SnapshotterTest, WhatTheDeviceRefusesNamesTheTensor) {
  std::vector<std::uint8_t> bytes(10);
  TensorView view = TensorView::row_major(bytes.data(), DType::kBool, {10});
  view.negative = true;
  const auto snapshotter = make(kMiB);
  const auto snapshot =
      snapshotter->take(StateDict{{"m", StateDict{{"mask", view}}}}, until(soon()), nullptr);
  ASSERT_FALSE(snapshot);
  EXPECT_EQ(snapshot.error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(snapshot.error().key_path, "m.mask");
  EXPECT_EQ(snapshotter->slab().bytes_in_use(), 0u);
}

TEST_F(SnapshotterTest, DoesNotReturnBeforeTheLastCompletion) {
  std::vector<std::uint8_t> bytes = random_bytes(kMiB, 3);  // Four chunks.
  const StateDict state{{"m", StateDict{{"w", on_fake_device(bytes)}}}};
  const auto snapshotter = make(16 * kMiB);
  std::atomic<bool> returned = false;
  std::thread trainer([&] {
    const auto snapshot = snapshotter->take(state, until(soon()), nullptr);
    returned = true;
    ASSERT_TRUE(snapshot);
    const auto files = read_files(**snapshot, kLongAgo);
    EXPECT_EQ(files.value(), expected_files(state, (*snapshot)->plan()));
    expect_digests(**snapshot, *files);
  });
  ASSERT_TRUE(fake_->wait_for_pending(4, soon()));
  EXPECT_TRUE(fake_->complete_newest());
  EXPECT_TRUE(fake_->complete_oldest());
  EXPECT_TRUE(fake_->complete_oldest());
  EXPECT_FALSE(returned);
  EXPECT_TRUE(fake_->complete_oldest());
  trainer.join();
}

TEST_F(SnapshotterTest, AFailingCopyFailsTheSnapshotAndNotTheNext) {
  std::vector<std::uint8_t> bytes = random_bytes(kMiB, 3);
  const StateDict state{{"m", StateDict{{"w", on_fake_device(bytes)}}}};
  const auto snapshotter = make(16 * kMiB);
  std::shared_ptr<Snapshot> given;
  TakeOptions options = until(soon());
  options.started = [&](std::shared_ptr<Snapshot> snapshot) {
    given = std::move(snapshot);
    return Status();
  };
  std::thread trainer([&] {
    const auto snapshot = snapshotter->take(state, options, nullptr);
    ASSERT_FALSE(snapshot);
    EXPECT_EQ(snapshot.error().code, ErrorCode::kIo);
    EXPECT_EQ(snapshot.error().key_path, "m.w");
    EXPECT_NE(snapshot.error().message.find("ECC"), std::string::npos);
  });
  ASSERT_TRUE(fake_->wait_for_pending(4, soon()));
  EXPECT_TRUE(fake_->complete_oldest());
  EXPECT_TRUE(fake_->fail_oldest(Error{.code = ErrorCode::kIo, .message = "ECC error"}));
  trainer.join();
  EXPECT_EQ(given->wait_segment(0, kLongAgo).error().code, ErrorCode::kIo);
  EXPECT_GT(snapshotter->slab().bytes_in_use(), 0u) << "two copies are still outstanding";
  EXPECT_EQ(fake_->complete_all(), 2u);
  EXPECT_EQ(snapshotter->slab().bytes_in_use(), 0u);
  fake_->set_immediate(true);
  EXPECT_TRUE(snapshotter->take(state, until(soon()), nullptr));
}

TEST_F(SnapshotterTest, AfterTheDeadlineMemoryAndTensorStayHeldUntilTheLateCompletion) {
  std::vector<std::uint8_t> bytes = random_bytes(kMiB, 3);
  const auto keep_alive = std::make_shared<int>(0);
  const std::weak_ptr<int> kept = keep_alive;
  auto snapshotter = make(kMiB + 4096);  // One generation.
  {
    TensorView view = on_fake_device(bytes);
    view.keep_alive = keep_alive;
    const StateDict state{{"m", StateDict{{"w", view}}}};
    const auto late = snapshotter->take(state, impatient(), nullptr);
    ASSERT_FALSE(late);
    EXPECT_EQ(late.error().code, ErrorCode::kTimeout);
  }
  EXPECT_EQ(keep_alive.use_count(), 1 + 4);
  EXPECT_EQ(fake_->pending(), 4u);
  // The memory that the device will write to is not given to anybody else.
  std::vector<std::uint8_t> other = random_bytes(kMiB, 4);
  const StateDict next{{"m", StateDict{{"w", TensorView::of(other)}}}};
  TakeOptions at_once = until(soon());
  at_once.wait_for_memory = false;
  EXPECT_EQ(snapshotter->take(next, at_once, nullptr).error().code, ErrorCode::kTimeout);
  EXPECT_EQ(fake_->complete_all(), 4u);
  EXPECT_EQ(keep_alive.use_count(), 1);
  const auto snapshot = snapshotter->take(next, at_once, nullptr);
  ASSERT_TRUE(snapshot) << snapshot.error().text();
  EXPECT_EQ(read_files(**snapshot, kLongAgo).value(), expected_files(next, (*snapshot)->plan()));
}

TEST_F(SnapshotterTest, LateCompletionsOutliveTheSnapshotter) {
  std::vector<std::uint8_t> bytes = random_bytes(kMiB, 3);
  const StateDict state{{"m", StateDict{{"w", on_fake_device(bytes)}}}};
  EXPECT_FALSE(make(16 * kMiB)->take(state, impatient(), nullptr));
  EXPECT_EQ(fake_->complete_all(), 4u);
}

TEST_F(SnapshotterTest, WorkersThatComeLateFindNothingToDo) {
  Model model;
  const StateDict state = model.state();
  testing::ManualExecutor workers(4);
  auto snapshotter = make(64 * kMiB, &workers);
  const auto snapshot = snapshotter->take(state, until(soon()), nullptr);
  ASSERT_TRUE(snapshot) << "the caller copies alone when no worker comes";
  EXPECT_GT(workers.queued(), 0u);
  const auto expected = expected_files(state, (*snapshot)->plan());
  model.large.assign(model.large.size(), 0);
  workers.run_one();
  EXPECT_EQ(read_files(**snapshot, kLongAgo).value(), expected);
  snapshotter.reset();
  workers.run_all();
}

TEST_F(SnapshotterTest, WithoutWaitingAFullSlabFailsAtOnce) {
  std::vector<std::uint8_t> bytes = random_bytes(kMiB, 3);
  const StateDict state{{"m", StateDict{{"w", TensorView::of(bytes)}}}};
  const auto snapshotter = make(kMiB + 8192);
  auto held = snapshotter->take(state, until(soon()), nullptr);
  ASSERT_TRUE(held);
  TakeOptions options = until(soon());
  options.wait_for_memory = false;
  bool started = false;
  options.started = [&](const std::shared_ptr<Snapshot>&) {
    started = true;
    return Status();
  };
  EXPECT_EQ(snapshotter->take(state, options, nullptr).error().code, ErrorCode::kTimeout);
  EXPECT_FALSE(started);
  held->reset();
  EXPECT_TRUE(snapshotter->take(state, options, nullptr));
}

TEST_F(SnapshotterTest, AnInterruptedWaitForADeviceEndsTheTakeAndALateCompletionHarmsNothing) {
  std::vector<std::uint8_t> bytes = random_bytes(kMiB, 3);
  const StateDict state{{"m", StateDict{{"w", on_fake_device(bytes)}}}};
  const auto snapshotter = make(16 * kMiB);
  TakeOptions options = until(soon());
  std::shared_ptr<Snapshot> given;
  options.started = [&](std::shared_ptr<Snapshot> snapshot) {
    given = std::move(snapshot);
    return Status();
  };
  options.interrupted = [] { return true; };
  EXPECT_EQ(snapshotter->take(state, options, nullptr).error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(given->status().error().code, ErrorCode::kUnavailable);
  EXPECT_GT(snapshotter->slab().bytes_in_use(), 0u);  // The device may still write there.
  fake_->complete_all();
  EXPECT_EQ(snapshotter->slab().bytes_in_use(), 0u);
  fake_->set_immediate(true);
  EXPECT_TRUE(snapshotter->take(state, options, nullptr));  // Nothing to wait for: not asked.
}

TEST_F(SnapshotterTest, ATakeInWavesCanBeInterruptedWhileItsConsumerHoldsThem) {
  std::vector<std::uint8_t> bytes = random_bytes(5 * kMiB, 3);
  const StateDict state{{"m", StateDict{{"w", TensorView::of(bytes)}}}};
  const auto snapshotter = make(2 * kMiB);
  TakeOptions options = until(soon());
  std::shared_ptr<Snapshot> held;
  options.started = [&](std::shared_ptr<Snapshot> snapshot) {
    held = std::move(snapshot);
    return Status();
  };
  options.interrupted = [] { return true; };
  EXPECT_EQ(snapshotter->take(state, options, nullptr).error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(held->status().error().code, ErrorCode::kUnavailable);
  held->abandon(Error{});
  EXPECT_EQ(snapshotter->slab().bytes_in_use(), 0u);
}

TEST_F(SnapshotterTest, AnErrorOfStartedEndsTheTake) {
  std::vector<std::uint8_t> bytes = random_bytes(kMiB, 3);
  const StateDict state{{"m", StateDict{{"w", TensorView::of(bytes)}}}};
  const auto snapshotter = make(16 * kMiB);
  TakeOptions options = until(soon());
  options.started = [](const std::shared_ptr<Snapshot>&) -> Status {
    return failure(ErrorCode::kUnavailable, "closed");
  };
  EXPECT_EQ(snapshotter->take(state, options, nullptr).error().message, "closed");
  EXPECT_EQ(snapshotter->slab().bytes_in_use(), 0u);
}

// A consumer thread that reads a snapshot given by `started`.
class Consumer {
 public:
  std::function<Status(std::shared_ptr<Snapshot>)> started() {
    return [this](std::shared_ptr<Snapshot> snapshot) {
      snapshot_ = std::move(snapshot);
      thread_ = std::thread([this] { files_ = read_files(*snapshot_, soon()); });
      return Status();
    };
  }
  Result<std::vector<std::vector<std::byte>>>& files() {
    if (thread_.joinable()) thread_.join();
    return files_;
  }
  ~Consumer() {
    if (thread_.joinable()) thread_.join();
  }

 private:
  std::shared_ptr<Snapshot> snapshot_;
  std::thread thread_;
  Result<std::vector<std::vector<std::byte>>> files_;
};

TEST_F(SnapshotterTest, WavesUnderATinyCeilingGiveTheSameBytesAndDigests) {
  Model model;
  const StateDict state = model.state();
  const auto workers = base::ThreadExecutor::start(2, 16, "copy").value();
  for (const std::uint64_t ceiling : {kMiB, kMiB + 12 * 1024, 2 * kMiB + 4096}) {
    const auto snapshotter = make(ceiling, workers.get());
    Consumer consumer;
    TakeOptions options = until(soon());
    options.started = consumer.started();
    const auto snapshot = snapshotter->take(state, options, nullptr);
    ASSERT_TRUE(snapshot) << snapshot.error().text();
    EXPECT_TRUE((*snapshot)->in_waves());
    EXPECT_LE(snapshotter->slab().bytes_mapped(), ceiling);
    ASSERT_TRUE(consumer.files()) << consumer.files().error().text();
    EXPECT_EQ(*consumer.files(), expected_files(state, (*snapshot)->plan()));
    expect_digests(**snapshot, *consumer.files());
    EXPECT_EQ((*snapshot)->bytes_staged(), (*snapshot)->plan().data_bytes());
  }
}

TEST_F(SnapshotterTest, WavesFromADeviceThatFinishesLaterGiveTheSame) {
  std::vector<std::uint8_t> bytes = random_bytes(5 * kMiB + 77, 3);
  const StateDict state{{"m", StateDict{{"w", on_fake_device(bytes)}}}};
  const auto snapshotter = make(kMiB);
  Consumer consumer;
  TakeOptions options = until(soon());
  options.started = consumer.started();
  std::atomic<bool> returned = false;
  std::thread device([&] {
    while (!returned) {
      fake_->wait_for_pending(1, std::chrono::steady_clock::now() + std::chrono::milliseconds(1));
      fake_->complete_newest();
    }
  });
  const auto snapshot = snapshotter->take(state, options, nullptr);
  returned = true;
  device.join();
  ASSERT_TRUE(snapshot) << snapshot.error().text();
  ASSERT_TRUE(consumer.files());
  EXPECT_EQ(*consumer.files(), expected_files(state, (*snapshot)->plan()));
  expect_digests(**snapshot, *consumer.files());
}

TEST_F(SnapshotterTest, ManySmallFilesBeyondTheCeilingAreWavesToo) {
  std::vector<std::vector<std::uint8_t>> tensors;
  StateDictBuilder builder;
  for (std::uint64_t i = 0; i < 8; ++i) {
    tensors.push_back(random_bytes(300'000, i));
    ASSERT_TRUE(builder.begin("g" + std::to_string(i), NodeKind::kDict));
    ASSERT_TRUE(builder.tensor("w", TensorView::of(tensors.back())));
    ASSERT_TRUE(builder.end());
  }
  const StateDict state = builder.finish().value();
  const auto snapshotter = make(kMiB);
  Consumer consumer;
  TakeOptions options = until(soon());
  options.started = consumer.started();
  const auto snapshot = snapshotter->take(state, options, nullptr);
  ASSERT_TRUE(snapshot) << snapshot.error().text();
  EXPECT_TRUE((*snapshot)->in_waves());
  EXPECT_EQ((*snapshot)->segments().size(), 8u);
  EXPECT_EQ(consumer.files().value(), expected_files(state, (*snapshot)->plan()));
}

TEST_F(SnapshotterTest, WavesDoNotWaitForWorkersThatNeverCome) {
  Model model;
  const StateDict state = model.state();
  testing::ManualExecutor workers(4);
  const auto snapshotter = make(2 * kMiB, &workers);
  Consumer consumer;
  TakeOptions options = until(soon());
  options.started = consumer.started();
  const auto snapshot = snapshotter->take(state, options, nullptr);
  ASSERT_TRUE(snapshot) << snapshot.error().text();
  EXPECT_EQ(consumer.files().value(), expected_files(state, (*snapshot)->plan()));
}

TEST_F(SnapshotterTest, WavesWithoutAConsumerAreRefused) {
  Model model;
  const auto snapshot = make(2 * kMiB)->take(model.state(), until(soon()), nullptr);
  ASSERT_FALSE(snapshot);
  EXPECT_EQ(snapshot.error().code, ErrorCode::kMemoryLimit);
  EXPECT_NE(snapshot.error().message.find("waves"), std::string::npos);
}

TEST_F(SnapshotterTest, ACeilingTooSmallForWavesIsRefused) {
  Model model;
  Consumer consumer;
  TakeOptions options = until(soon());
  options.started = consumer.started();
  const auto snapshot = make(kMiB - 1)->take(model.state(), options, nullptr);
  ASSERT_FALSE(snapshot);
  EXPECT_EQ(snapshot.error().code, ErrorCode::kMemoryLimit);
  EXPECT_NE(snapshot.error().message.find("1048576"), std::string::npos);
}

TEST_F(SnapshotterTest, AConsumerThatHoldsItsWavesForEverMakesTheTakeTimeOut) {
  Model model;
  const auto snapshotter = make(2 * kMiB);
  std::shared_ptr<Snapshot> given;
  TakeOptions options = impatient();
  options.started = [&](std::shared_ptr<Snapshot> snapshot) {
    given = std::move(snapshot);
    return Status();
  };
  const auto snapshot = snapshotter->take(model.state(), options, nullptr);
  ASSERT_FALSE(snapshot);
  EXPECT_EQ(snapshot.error().code, ErrorCode::kTimeout);
  EXPECT_EQ(given->wait_segment(2, kLongAgo).error().code, ErrorCode::kTimeout);
  given.reset();
  EXPECT_EQ(snapshotter->slab().bytes_in_use(), 0u);
}

TEST_F(SnapshotterTest, EachWaveMayWaitAnewSoThatASlowConsumerIsNoFailure) {
  std::vector<std::uint8_t> bytes = random_bytes(5 * kMiB, 3);
  const StateDict state{{"m", StateDict{{"w", TensorView::of(bytes)}}}};
  const auto snapshotter = make(2 * kMiB);
  TakeOptions options = until(soon());
  options.wave_wait = std::chrono::seconds(2);
  std::thread consumer;
  options.started = [&](std::shared_ptr<Snapshot> snapshot) {
    consumer = std::thread([snapshot = std::move(snapshot)] {
      for (std::size_t i = 0; i < snapshot->segments().size(); ++i) {
        ASSERT_TRUE(snapshot->wait_segment(i, soon()));
        // No segment that lies further ahead than memory can come before this one is released, so
        // this lasts until its deadline: two of them are longer than the patience with one wave.
        if (i < 2) {
          const auto ahead = snapshot->wait_segment(
              i + 2, std::chrono::steady_clock::now() + std::chrono::milliseconds(1200));
          ASSERT_FALSE(ahead);
        }
        snapshot->release_segment(i);
      }
    });
    return Status();
  };
  const auto snapshot = snapshotter->take(state, options, nullptr);
  consumer.join();
  EXPECT_TRUE(snapshot) << snapshot.error().text();
}

TEST_F(SnapshotterTest, AConsumerThatAbandonsItsWavesEndsTheTake) {
  Model model;
  const auto snapshotter = make(2 * kMiB);
  std::thread consumer;
  TakeOptions options = until(soon());
  options.started = [&](std::shared_ptr<Snapshot> snapshot) {
    consumer = std::thread([snapshot = std::move(snapshot)] {
      ASSERT_TRUE(snapshot->wait_segment(1, soon()));
      snapshot->abandon(Error{.code = ErrorCode::kIo, .message = "disk full"});
    });
    return Status();
  };
  const auto snapshot = snapshotter->take(model.state(), options, nullptr);
  consumer.join();
  ASSERT_FALSE(snapshot);
  EXPECT_EQ(snapshot.error().message, "disk full");
  EXPECT_EQ(snapshotter->slab().bytes_in_use(), 0u);
}

TEST_F(SnapshotterTest, SeveralTrainersShareOneCeiling) {
  const auto workers = base::ThreadExecutor::start(2, 64, "copy").value();
  const auto snapshotter = make(3 * kMiB, workers.get());
  std::vector<std::thread> trainers;
  for (std::uint64_t id = 0; id < 3; ++id) {
    trainers.emplace_back([&, id] {
      std::vector<std::uint8_t> bytes = random_bytes(id == 2 ? 4 * kMiB : 600'000 + id, id);
      const StateDict state{{"m", StateDict{{"w", TensorView::of(bytes)}}}};
      for (int round = 0; round < 6; ++round) {
        for (std::size_t i = 0; i < bytes.size(); i += 100) ++bytes[i];
        Consumer consumer;
        TakeOptions options = until(soon());
        options.started = consumer.started();
        const auto snapshot = snapshotter->take(state, options, nullptr);
        ASSERT_TRUE(snapshot) << snapshot.error().text();
        ASSERT_TRUE(consumer.files());
        ASSERT_EQ(*consumer.files(), expected_files(state, (*snapshot)->plan()));
        expect_digests(**snapshot, *consumer.files());
      }
    });
  }
  for (auto& trainer : trainers) trainer.join();
  EXPECT_LE(snapshotter->slab().bytes_mapped(), 3 * kMiB);
}

TEST_F(SnapshotterTest, TheDefaultCeilingHoldsTwoGenerations) {
  Model model;
  const StateDict state = model.state();
  Snapshotter::Options plain;
  Snapshotter snapshotter(std::move(plain), devices_, nullptr, clock_);
  const auto first = snapshotter.take(state, until(soon()), nullptr);
  ASSERT_TRUE(first) << first.error().text();
  TakeOptions at_once = until(soon());
  at_once.wait_for_memory = false;
  const auto second = snapshotter.take(state, at_once, nullptr);
  EXPECT_TRUE(second);
  EXPECT_EQ(snapshotter.take(state, at_once, nullptr).error().code, ErrorCode::kTimeout);
}

}  // namespace
}  // namespace strandline::staging
