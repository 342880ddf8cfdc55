// When the future ends: with the last byte of the device, with its error, or with the deadline.
//
// The fake device copies when the test says so. The watcher, which ends what takes too long, is an
// executor that the test runs; one test has its real thread.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <latch>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "staging/copy_job.h"
#include "staging/copy_workers.h"
#include "staging/stager_impl.h"
#include "strandline/stager.h"
#include "testing/checkpoint_fixture.h"
#include "testing/child_process.h"
#include "testing/fake_device.h"
#include "testing/manual_executor.h"

namespace strandline::testing {
namespace {

using ::testing::HasSubstr;

constexpr std::uint64_t kMiB = 1 << 20;
constexpr std::chrono::milliseconds kNow{0};

class DefaultStagerTest : public ::testing::Test {
 protected:
  DefaultStagerTest() {
    config_.host_bytes_max = kMiB + 4096;
    config_.use_shared_memory = false;
    auto devices = std::make_shared<device::Registry>();
    devices->add(fake_);
    parts_.clock = std::make_shared<base::SystemClock>();
    parts_.devices = devices;
    parts_.watcher = watcher_;
  }

  DefaultStager open() { return must(StagerAccess::open(config_, parts_)); }

  // A MiB on the fake device: four copies of it. And ten bytes on the host.
  StateDict state() {
    TensorView on_device = TensorView::of(device_bytes_);
    on_device.device.kind = "fake";
    return StateDict{{"model", StateDict{{"w", on_device}}}, {"host", TensorView::of(host_bytes_)}};
  }

  std::vector<std::byte> staged_bytes(const Future<StateDict>& future, const char* path) {
    return bytes_of(must(must(future.get(kNow)).tensor(path)));
  }

  std::vector<std::uint8_t> device_bytes_ = std::vector<std::uint8_t>(kMiB, 7);
  std::vector<std::uint8_t> host_bytes_ = std::vector<std::uint8_t>(10, 9);
  std::shared_ptr<FakeDevice> fake_ = std::make_shared<FakeDevice>();
  std::shared_ptr<ManualExecutor> watcher_ = std::make_shared<ManualExecutor>();
  CheckpointStagerConfig config_;
  staging::StagerParts parts_;
};

TEST_F(DefaultStagerTest, TheFutureIsNotReadyBeforeTheDeviceHasCopiedTheLastByte) {
  DefaultStager stager = open();
  const Future<StateDict> future = must(stager.stage(state()));
  EXPECT_EQ(fake_->pending(), 4u);
  for (int i = 0; i < 4; ++i) {
    EXPECT_FALSE(future.ready());
    EXPECT_EQ(must_fail(future.get(kNow)).code, ErrorCode::kTimeout);
    EXPECT_TRUE(i % 2 == 0 ? fake_->complete_newest() : fake_->complete_oldest());
  }
  EXPECT_TRUE(future.ready());
  EXPECT_EQ(staged_bytes(future, "model.w"), std::vector<std::byte>(kMiB, std::byte{7}));
  EXPECT_EQ(must(future.get(kNow)).tensors()[0].device, DeviceId());
}

TEST_F(DefaultStagerTest, HostTensorsHaveBeenCopiedWhenItReturns) {
  DefaultStager stager = open();
  const Future<StateDict> future = must(stager.stage(state()));
  std::memset(host_bytes_.data(), 0, host_bytes_.size());
  host_bytes_ = {};
  EXPECT_EQ(fake_->complete_all(), 4u);
  EXPECT_EQ(staged_bytes(future, "host"), std::vector<std::byte>(10, std::byte{9}));
}

TEST_F(DefaultStagerTest, AStateOfTheHostAloneIsReadyAtOnce) {
  DefaultStager stager = open();
  const StateDict host{{"w", TensorView::of(host_bytes_)}, {"epoch", 3}};
  const Future<StateDict> future = must(stager.stage(host));
  EXPECT_TRUE(future.ready());
  EXPECT_EQ(content_of(must(future.get(kNow))), content_of(host));
  EXPECT_TRUE(must(stager.stage(StateDict{{"epoch", 3}})).ready());
  EXPECT_EQ(watcher_->queued(), 0u);
}

TEST_F(DefaultStagerTest, WithoutAsyncItReturnsWhenTheDeviceHasFinished) {
  config_.use_async_staging = false;
  DefaultStager stager = open();
  std::atomic<bool> returned = false;
  std::thread trainer([&] {
    const Future<StateDict> future = must(stager.stage(state()));
    returned = true;
    EXPECT_TRUE(future.ready());
  });
  ASSERT_TRUE(fake_->wait_for_pending(4, std::chrono::steady_clock::now() + kPatience));
  for (int i = 0; i < 4; ++i) {
    EXPECT_FALSE(returned);
    EXPECT_TRUE(fake_->complete_oldest());
  }
  trainer.join();
}

TEST_F(DefaultStagerTest, AnErrorOfTheDeviceFailsTheFutureAndTheNextStagingWorks) {
  DefaultStager stager = open();
  const Future<StateDict> future = must(stager.stage(state()));
  EXPECT_TRUE(fake_->complete_oldest());
  EXPECT_TRUE(fake_->fail_oldest(Error{.code = ErrorCode::kIo, .message = "ECC error"}));
  EXPECT_TRUE(future.ready());
  const Error error = must_fail(future.get(kNow));
  EXPECT_EQ(error.code, ErrorCode::kIo);
  EXPECT_EQ(error.key_path, "model.w");
  EXPECT_THAT(error.message, HasSubstr("ECC error"));
  // Two copies are still outstanding: the ceiling holds one generation, and it is theirs.
  EXPECT_EQ(must_fail(stager.stage(state())).code, ErrorCode::kMemoryLimit);
  EXPECT_EQ(fake_->complete_all(), 2u);
  fake_->set_immediate(true);
  EXPECT_TRUE(must(must(stager.stage(state())).get(kNow)).structure().tensors().size() == 2);
}

TEST_F(DefaultStagerTest, AnErrorThatComesBeforeItReturnsFailsTheFutureToo) {
  DefaultStager stager = open();
  const std::shared_ptr<ManualExecutor> watcher = watcher_;
  // A device that refuses at once.
  class Refusing final : public Device {
   public:
    [[nodiscard]] std::string_view kind() const override { return "fake"; }
    void copy_to_host_async(const TensorView&, std::uint64_t, std::span<std::byte>,
                            Completion done) override {
      done(failure(ErrorCode::kUnsupported, "no such stream"));
    }
    void copy_from_host_async(std::span<const std::byte>, const TensorView&, std::uint64_t,
                              Completion) override {}
  };
  auto devices = std::make_shared<device::Registry>();
  devices->add(std::make_shared<Refusing>());
  parts_.devices = devices;
  DefaultStager refused = open();
  const Future<StateDict> future = must(refused.stage(state()));
  EXPECT_TRUE(future.ready());
  EXPECT_EQ(must_fail(future.get(kNow)).key_path, "model.w");
  EXPECT_EQ(must_fail(must(refused.stage(state())).get(kNow)).code, ErrorCode::kUnsupported)
      << "its memory is free again";
}

TEST_F(DefaultStagerTest, WhatCannotBeStagedFailsAtOnce) {
  DefaultStager stager = open();
  TensorView wrong = TensorView::of(host_bytes_);
  wrong.storage_bytes = 1;
  EXPECT_EQ(must_fail(stager.stage(StateDict{{"w", wrong}})).key_path, "w");
  std::vector<std::uint8_t> large(2 * kMiB);
  EXPECT_EQ(must_fail(stager.stage(StateDict{{"w", TensorView::of(large)}})).code,
            ErrorCode::kMemoryLimit);
}

TEST_F(DefaultStagerTest, TheDeadlineEndsWhatADeviceDoesNotAndALateCompletionHarmsNothing) {
  config_.device_wait = kNow;
  DefaultStager stager = open();
  const auto keep_alive = std::make_shared<int>(0);
  Future<StateDict> future = [&] {
    StateDict kept = state();
    kept.tensors()[0].keep_alive = keep_alive;
    return must(stager.stage(kept));
  }();
  EXPECT_FALSE(future.ready());
  ASSERT_TRUE(watcher_->run_one());
  ASSERT_TRUE(future.ready());
  EXPECT_EQ(must_fail(future.get(kNow)).code, ErrorCode::kTimeout);
  EXPECT_THAT(must_fail(future.get(kNow)).message, HasSubstr("device_wait"));
  // The device may still write there: tensor and memory are held.
  EXPECT_GT(keep_alive.use_count(), 1);
  EXPECT_EQ(must_fail(stager.stage(state())).code, ErrorCode::kMemoryLimit);
  EXPECT_EQ(fake_->complete_all(), 4u);
  EXPECT_EQ(keep_alive.use_count(), 1);
  EXPECT_EQ(must_fail(future.get(kNow)).code, ErrorCode::kTimeout) << "it stays failed";
  fake_->set_immediate(true);
  EXPECT_TRUE(must(must(stager.stage(state())).get(kNow)).structure().tensors().size() == 2);
}

TEST_F(DefaultStagerTest, TheWatchersOwnThreadEndsItToo) {
  config_.device_wait = std::chrono::milliseconds(1);
  parts_.watcher = must(base::ThreadExecutor::start(1, 4, "watcher"));
  DefaultStager stager = open();
  const Future<StateDict> future = must(stager.stage(state()));
  EXPECT_EQ(must_fail(future.get(kPatience)).message, staging::kDeviceTooSlow);
  EXPECT_TRUE(stager.close());
  EXPECT_EQ(fake_->complete_all(), 4u);
}

TEST_F(DefaultStagerTest, AWatcherThatComesLateChangesNothing) {
  config_.device_wait = kNow;
  DefaultStager stager = open();
  const Future<StateDict> future = must(stager.stage(state()));
  EXPECT_EQ(fake_->complete_all(), 4u);
  ASSERT_TRUE(watcher_->run_one());
  EXPECT_EQ(staged_bytes(future, "model.w"), std::vector<std::byte>(kMiB, std::byte{7}));
}

TEST_F(DefaultStagerTest, ResultsAndLateCompletionsOutliveTheStager) {
  config_.device_wait = kNow;
  config_.host_bytes_max = 4 * kMiB;
  std::optional<DefaultStager> stager(open());
  const Future<StateDict> good = must(stager->stage(state()));
  EXPECT_EQ(fake_->complete_all(), 4u);
  const Future<StateDict> late = must(stager->stage(state()));
  watcher_->run_all();
  EXPECT_TRUE(stager->close());
  stager.reset();
  parts_ = {};
  EXPECT_EQ(fake_->complete_all(), 4u);
  EXPECT_EQ(must_fail(late.get(kNow)).code, ErrorCode::kTimeout);
  EXPECT_EQ(staged_bytes(good, "model.w")[77], std::byte{7});
}

TEST_F(DefaultStagerTest, CallbacksComeWithTheLastCompletion) {
  DefaultStager stager = open();
  const Future<StateDict> future = must(stager.stage(state()));
  int calls = 0;
  future.then([&](const Result<StateDict>& result) {
    EXPECT_TRUE(result);
    // The memory of what failed or was dropped is free by now, so a callback may stage again.
    ++calls;
  });
  EXPECT_EQ(calls, 0);
  fake_->complete_all();
  EXPECT_EQ(calls, 1);
}

TEST_F(DefaultStagerTest, WhoHearsOfAFailureFindsItsMemoryFree) {
  DefaultStager stager = open();
  const Future<StateDict> future = must(stager.stage(state()));
  EXPECT_TRUE(fake_->complete_oldest());
  EXPECT_TRUE(fake_->complete_oldest());
  EXPECT_TRUE(fake_->complete_oldest());
  bool staged = false;
  future.then([&](const Result<StateDict>& result) {
    EXPECT_FALSE(result);
    staged = stager.stage(StateDict{{"again", TensorView::of(device_bytes_)}}).has_value();
  });
  EXPECT_TRUE(fake_->fail_oldest(Error{.code = ErrorCode::kIo, .message = "ECC error"}));
  EXPECT_TRUE(staged) << "one generation fits, and the failed one no longer counts";
}

TEST_F(DefaultStagerTest, WhoDropsAResultAtOnceMayStageTheNext) {
  // The last completion comes from another thread, which is still inside of it when the future is
  // ready.
  DefaultStager stager = open();
  std::atomic<bool> over = false;
  std::thread device([&] {
    while (!over) {
      fake_->wait_for_pending(1, std::chrono::steady_clock::now() + std::chrono::milliseconds(1));
      fake_->complete_oldest();
    }
  });
  for (int round = 0; round < 200; ++round) {
    const Result<Future<StateDict>> future = stager.stage(state());
    if (!future) {
      ADD_FAILURE() << "round " << round << ": " << future.error().text();
      break;
    }
    EXPECT_TRUE(future->get(kPatience));
  }
  over = true;
  device.join();
}

TEST_F(DefaultStagerTest, TheSynchronousStagerNamesWhatADeviceCouldNotCopyInTime) {
  StateDictStager stager = must(StagerAccess::open(
      StateDictStager::Options{.host_bytes_max = kMiB + 4096, .device_wait = kNow}, parts_));
  EXPECT_EQ(must_fail(stager.stage(state())).code, ErrorCode::kTimeout);
  EXPECT_EQ(must_fail(stager.stage(state())).code, ErrorCode::kMemoryLimit)
      << "the device may still write there";
  EXPECT_EQ(stager.host_bytes_in_use(), kMiB + 4096);
  EXPECT_EQ(fake_->complete_all(), 4u);
  EXPECT_EQ(stager.host_bytes_in_use(), 0u);
  fake_->set_immediate(true);
  EXPECT_EQ(content_of(must(stager.stage(state())))[2], content_of(state())[2]);
}

TEST_F(DefaultStagerTest, TheSynchronousStagerRaisesADevicesErrorWithThePath) {
  StateDictStager stager =
      must(StagerAccess::open(StateDictStager::Options{.host_bytes_max = kMiB + 4096}, parts_));
  std::thread trainer([&] {
    const Error error = must_fail(stager.stage(state()));
    EXPECT_EQ(error.code, ErrorCode::kIo);
    EXPECT_EQ(error.key_path, "model.w");
  });
  ASSERT_TRUE(fake_->wait_for_pending(4, std::chrono::steady_clock::now() + kPatience));
  EXPECT_TRUE(fake_->fail_oldest(Error{.code = ErrorCode::kIo, .message = "ECC error"}));
  trainer.join();
  fake_->complete_all();
  fake_->set_immediate(true);
  EXPECT_TRUE(stager.stage(state()));
}

// Copies at once, but lets its completions go only when it ends, as a driver may.
class Hoarder final : public Device {
 public:
  [[nodiscard]] std::string_view kind() const override { return "fake"; }
  void copy_to_host_async(const TensorView& source, std::uint64_t first_byte,
                          std::span<std::byte> host, Completion done) override {
    std::memcpy(host.data(), source.data + first_byte, host.size());
    completions_.push_back(done);
    done({});
  }
  void copy_from_host_async(std::span<const std::byte>, const TensorView&, std::uint64_t,
                            Completion) override {}

 private:
  std::vector<Completion> completions_;
};

TEST_F(DefaultStagerTest, MemoryIsFreeWithItsLastHolderWhateverTheDeviceHoldsOnTo) {
  auto devices = std::make_shared<device::Registry>();
  devices->add(std::make_shared<Hoarder>());
  parts_.devices = devices;
  for (const bool async : {true, false}) {
    config_.use_async_staging = async;
    DefaultStager stager = open();
    for (int i = 0; i < 3; ++i) {
      const Result<Future<StateDict>> future = stager.stage(state());
      ASSERT_TRUE(future) << future.error().text();
      EXPECT_TRUE(future->ready());
    }
  }
}

// Completes before it returns. The calling thread goes on when a worker has begun, and the worker
// ends after the caller.
class SlowOnWorkers final : public Device {
 public:
  explicit SlowOnWorkers(std::thread::id caller) : caller_(caller) {}
  [[nodiscard]] std::string_view kind() const override { return "fake"; }
  void copy_to_host_async(const TensorView& source, std::uint64_t first_byte,
                          std::span<std::byte> host, Completion done) override {
    if (std::this_thread::get_id() == caller_) {
      worker_began_.wait();
      if (--callers_pieces_ == 0) caller_ended_.count_down();
    } else if (!once_.exchange(true)) {
      worker_began_.count_down();
      caller_ended_.wait();
      for (int i = 0; i < 1000; ++i) std::this_thread::yield();
    }
    std::memcpy(host.data(), source.data + first_byte, host.size());
    done({});
  }
  void copy_from_host_async(std::span<const std::byte>, const TensorView&, std::uint64_t,
                            Completion) override {}

 private:
  const std::thread::id caller_;
  std::latch worker_began_{1};
  std::latch caller_ended_{1};
  std::atomic<bool> once_ = false;
  int callers_pieces_ = 8;  // Of one task.
};

TEST_F(DefaultStagerTest, ItDoesNotReturnWhileAWorkerStillReadsTheState) {
  static_assert(staging::kCopyTaskBytes == 2 * kMiB);
  auto devices = std::make_shared<device::Registry>();
  devices->add(std::make_shared<SlowOnWorkers>(std::this_thread::get_id()));
  parts_.devices = devices;
  parts_.workers = must(staging::start_copy_workers(1));
  config_.host_bytes_max = 4 * kMiB;
  DefaultStager stager = open();
  device_bytes_.assign(4 * kMiB, 7);  // Two tasks: one for each thread.
  TensorView view = TensorView::of(device_bytes_);
  view.device.kind = "fake";
  const Future<StateDict> future = must(stager.stage(StateDict{{"w", view}}));
  std::memset(device_bytes_.data(), 0, device_bytes_.size());
  EXPECT_TRUE(future.ready());
  EXPECT_EQ(staged_bytes(future, "w"), std::vector<std::byte>(4 * kMiB, std::byte{7}));
}

TEST_F(DefaultStagerTest, CloseWaitsForOutstandingCopies) {
  DefaultStager stager = open();
  const Future<StateDict> future = must(stager.stage(state()));
  std::atomic<bool> closed = false;
  std::thread closing([&] {
    EXPECT_TRUE(stager.close());
    closed = true;
    EXPECT_TRUE(future.ready());
  });
  for (int i = 0; i < 4; ++i) {
    EXPECT_FALSE(closed);
    EXPECT_TRUE(fake_->complete_oldest());
  }
  closing.join();
  EXPECT_TRUE(stager.close()) << "once more";
  const Error error = must_fail(stager.stage(state()));
  EXPECT_EQ(error.code, ErrorCode::kUnavailable);
  EXPECT_THAT(error.message, HasSubstr("closed"));
  EXPECT_EQ(staged_bytes(future, "model.w")[0], std::byte{7});
}

TEST_F(DefaultStagerTest, SeveralStagingsAreOutstandingAtOnceAndEndInAnyOrder) {
  config_.host_bytes_max = 4 * kMiB;
  DefaultStager stager = open();
  const Future<StateDict> first = must(stager.stage(state()));
  std::vector<std::uint8_t> other(1000, 5);
  TensorView view = TensorView::of(other);
  view.device.kind = "fake";
  const Future<StateDict> second = must(stager.stage(StateDict{{"w", view}}));
  EXPECT_EQ(fake_->pending(), 5u);
  EXPECT_TRUE(fake_->complete_newest());
  EXPECT_FALSE(first.ready());
  EXPECT_EQ(staged_bytes(second, "w"), std::vector<std::byte>(1000, std::byte{5}));
  fake_->complete_all();
  EXPECT_TRUE(first.ready());
}

TEST_F(DefaultStagerTest, OutstandingCopiesOfTheParentAreNoneOfAForkedChilds) {
  auto stager = std::make_unique<DefaultStager>(open());
  const Future<StateDict> future = must(stager->stage(state()));
  ChildProcess child([&]() -> std::string {
    if (future.get(std::chrono::hours(1))) return "it has arrived";
    const auto staged = stager->stage(state());
    if (staged || staged.error().code != ErrorCode::kUnavailable) return "it stages";
    if (!stager->close()) return "it does not close";
    stager.reset();
    return "as it should be";
  });
  EXPECT_EQ(child.wait(), "as it should be");
  fake_->complete_all();
  EXPECT_TRUE(future.ready());
}

TEST(DefaultStager, NonBlockingCopiesNeedADeviceAsPyTorchsDo) {
  const Error error = must_fail(DefaultStager::open());
  EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(error.message, HasSubstr("use_non_blocking_copy"));
  DefaultStager stager = must(DefaultStager::open({.use_non_blocking_copy = false}));
  std::vector<std::uint8_t> bytes(10, 3);
  const Future<StateDict> future = must(stager.stage(StateDict{{"w", TensorView::of(bytes)}}));
  EXPECT_TRUE(future.ready());
  EXPECT_TRUE(stager.close());
}

TEST(DefaultStager, IsACheckpointStager) {
  std::unique_ptr<CheckpointStager> stager =
      std::make_unique<DefaultStager>(must(DefaultStager::open({.use_non_blocking_copy = false})));
  EXPECT_TRUE(stager->stage(StateDict{{"epoch", 1}}));
  EXPECT_TRUE(stager->close());
}

}  // namespace
}  // namespace strandline::testing
