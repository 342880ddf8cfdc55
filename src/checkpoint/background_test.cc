// What happens behind the caller's back: cancelling, deadlines, failures, memory, devices, threads.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <future>
#include <thread>

#include "checkpoint/environment.h"
#include "checkpoint/pipeline.h"
#include "strandline/checkpointer.h"
#include "testing/checkpoint_fixture.h"
#include "testing/fake_device.h"
#include "testing/manual_clock.h"
#include "testing/manual_executor.h"

namespace strandline {
namespace {

using testing::content_of;
using ::testing::ElementsAre;
using testing::FakeDevice;
using testing::FaultInjectingStorage;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::Job;
using testing::kPatience;
using testing::ManualExecutor;
using testing::must;
using testing::must_fail;
using testing::names_in;
using testing::save_durably;
using testing::TemporaryDirectory;

constexpr std::chrono::milliseconds kAtOnce{0};
constexpr std::uint64_t kMiB = 1 << 20;

// A Checkpointer whose storage can be stopped at an operation.
class Background : public ::testing::Test {
 protected:
  Checkpointer open(CheckpointerOptions options = {}) {
    return must(Checkpointer::open(storage_, std::move(options)));
  }

  // The first call of `operation` waits until let_go().
  void hold_at(const std::string& operation) {
    held_ = std::make_shared<std::promise<void>>();
    release_ = std::make_shared<std::promise<void>>();
    auto gate = release_->get_future().share();
    auto once = std::make_shared<std::atomic<bool>>(false);
    storage_->before_each_call([held = held_, gate, once, operation](const auto& call) {
      if (call.operation != operation || once->exchange(true)) return;
      held->set_value();
      gate.wait_for(kPatience);  // A test that failed meanwhile does not let go.
    });
  }
  void wait_until_held() {
    ASSERT_EQ(held_->get_future().wait_for(kPatience), std::future_status::ready);
  }
  void let_go() { release_->set_value(); }

  const TemporaryDirectory directory_;
  const std::shared_ptr<FaultInjectingStorage> storage_ =
      testing::faulty_storage(directory_ / "run");
  std::shared_ptr<std::promise<void>> held_;
  std::shared_ptr<std::promise<void>> release_;
};

TEST_F(Background, CancelledBeforeItIsPublishedASaveIsSkippedAndNothingIsVisible) {
  for (const char* operation :
       {"begin", "create", "write_at", "sync", "list_partial", "file_bytes"}) {
    Checkpointer checkpointer = open();
    Job job(1);
    must(save_durably(checkpointer, 1, job));
    hold_at(operation);
    SaveOptions options;
    options.overwrite = true;
    const Save save = must(checkpointer.save(2, job.state(), options));
    wait_until_held();
    EXPECT_FALSE(save.outcome());
    save.cancel();
    let_go();
    const Outcome outcome = must(save.wait_durable(kPatience));
    EXPECT_EQ(outcome.kind, Outcome::Kind::kSkipped) << operation;
    ASSERT_TRUE(outcome.cause);
    EXPECT_EQ(outcome.cause->code, ErrorCode::kUnavailable);
    EXPECT_THAT(outcome.cause->message, HasSubstr("cancelled"));
    EXPECT_THAT(save.summary(), HasSubstr("skipped"));
    EXPECT_THAT(names_in(directory_ / "run"), ElementsAre("step-00000001")) << operation;
    must(save_durably(checkpointer, 3, job));
    must(checkpointer.close());  // A skipped save is no failure.
    std::filesystem::remove_all(directory_ / "run");
  }
}

TEST_F(Background, CancelledAfterwardsNothingChanges) {
  Checkpointer checkpointer = open();
  Job job(1);
  hold_at("publish");
  const Save save = must(checkpointer.save(1, job.state()));
  wait_until_held();
  save.cancel();  // Too late: the decision is made.
  let_go();
  EXPECT_EQ(must(save.wait_durable(kPatience)).kind, Outcome::Kind::kCommitted);
  save.cancel();
  EXPECT_EQ(save.outcome()->kind, Outcome::Kind::kCommitted);
  must(checkpointer.close());
}

TEST_F(Background, WaitingEndsAtItsDeadlineAndTheSaveGoesOn) {
  Checkpointer checkpointer = open();
  Job job(1);
  hold_at("sync");
  const Save save = must(checkpointer.save(1, job.state()));
  must(save.wait_staged(kAtOnce));
  wait_until_held();
  const Error error = must_fail(save.wait_durable(kAtOnce));
  EXPECT_EQ(error.code, ErrorCode::kTimeout);
  EXPECT_FALSE(save.outcome());
  EXPECT_EQ(must_fail(checkpointer.wait_until_finished(kAtOnce)).code, ErrorCode::kTimeout);
  EXPECT_THAT(save.summary(), HasSubstr("running"));
  let_go();
  EXPECT_EQ(must(save.wait_durable(kPatience)).kind, Outcome::Kind::kCommitted);
  must(checkpointer.wait_until_finished(kPatience));
}

TEST_F(Background, TheNextSaveWarnsOfAFailureOnceAndCloseRaisesIt) {
  Checkpointer checkpointer = open();
  Job job(1);
  must(save_durably(checkpointer, 1, job));
  storage_->fail_operation("write_at", 1, ENOSPC);
  const Save failed = must(checkpointer.save(2, job.state()));
  must(checkpointer.wait_until_finished(kPatience));
  EXPECT_EQ(failed.outcome()->kind, Outcome::Kind::kFailed);
  EXPECT_EQ(failed.outcome()->cause->system_errno, ENOSPC);

  const Save next = must(checkpointer.save(3, job.state()));
  EXPECT_THAT(next.warnings(), ElementsAre(HasSubstr("the save of step 2 failed")));
  must(checkpointer.wait_until_finished(kPatience));
  EXPECT_EQ(next.outcome()->kind, Outcome::Kind::kCommitted);
  EXPECT_THAT(must(checkpointer.save(4, job.state())).warnings(), IsEmpty());
  ASSERT_EQ(checkpointer.failures().size(), 1u);
  EXPECT_EQ(checkpointer.failures().front().system_errno, ENOSPC);
  const Error raised = must_fail(checkpointer.close());
  EXPECT_EQ(raised.code, ErrorCode::kIo);
  EXPECT_EQ(raised.system_errno, ENOSPC);
  EXPECT_THAT(raised.message, HasSubstr("the save of step 2 failed"));
  must(checkpointer.close());  // Raised once.
}

TEST_F(Background, AFailureThatWaitDurableRaisedIsNotRaisedAgain) {
  Checkpointer checkpointer = open();
  Job job(1);
  must(save_durably(checkpointer, 1, job));
  storage_->fail_operation("sync", 1, EIO);
  EXPECT_EQ(must_fail(save_durably(checkpointer, 2, job)).system_errno, EIO);
  EXPECT_THAT(checkpointer.failures(), IsEmpty());
  EXPECT_THAT(must(checkpointer.save(3, job.state())).warnings(), IsEmpty());
  must(checkpointer.close());
}

TEST_F(Background, AFailureIsWarnedOfOnceWhateverBecomesOfLaterOnes) {
  Checkpointer checkpointer = open();
  Job job(1);
  must(save_durably(checkpointer, 1, job));
  storage_->fail_operation("sync", 1, EIO);
  must(checkpointer.save(2, job.state()));
  must(checkpointer.wait_until_finished(kPatience));
  EXPECT_EQ(must(checkpointer.save(3, job.state())).warnings().size(), 1u);
  must(checkpointer.wait_until_finished(kPatience));
  storage_->fail_operation("sync", 1, EIO);
  must_fail(save_durably(checkpointer, 4, job));  // Raised here.
  EXPECT_THAT(must(checkpointer.save(5, job.state())).warnings(), IsEmpty());
  EXPECT_THAT(must_fail(checkpointer.close()).message, HasSubstr("step 2"));
}

TEST_F(Background, AFailureThatWaitDurableRaisedIsNotOneInARow) {
  Checkpointer checkpointer = open();
  Job job(1);
  must(save_durably(checkpointer, 1, job));
  for (const std::int64_t step : {2, 3, 4, 5}) {
    storage_->fail_operation("sync", 1, EIO);
    const Save save = must(checkpointer.save(step, job.state()));
    must(checkpointer.wait_until_finished(kPatience));
    if (step != 3) {
      EXPECT_FALSE(save.wait_durable(kAtOnce));
    }
    storage_->clear_faults();
  }
  const Save next = must(checkpointer.save(6, job.state()));
  EXPECT_THAT(next.warnings(), IsEmpty());  // Step 3 was warned of by step 4.
  EXPECT_THAT(must_fail(checkpointer.close()).message, HasSubstr("step 3"));
}

TEST_F(Background, TheThirdFailureInARowIsRaisedOnceAndThenTheCountStartsAgain) {
  Checkpointer checkpointer = open();
  Job job(1);
  must(save_durably(checkpointer, 1, job));
  const auto fail_one = [&](std::int64_t step) {
    storage_->fail_operation("sync", 1, EIO);
    const Result<Save> save = checkpointer.save(step, job.state());
    must(checkpointer.wait_until_finished(kPatience));
    storage_->clear_faults();
    return save;
  };
  for (const std::int64_t step : {2, 3, 4}) must(fail_one(step));
  const std::uint64_t calls = storage_->calls();
  const Error error = must_fail(checkpointer.save(5, job.state()));
  EXPECT_EQ(error.system_errno, EIO);
  EXPECT_THAT(error.message, HasSubstr("3 failures in a row"));
  EXPECT_THAT(error.message, HasSubstr("saved nothing"));
  EXPECT_EQ(storage_->calls(), calls);
  EXPECT_THAT(must(checkpointer.steps()), ElementsAre(1));
  // From the beginning.
  for (const std::int64_t step : {6, 7, 8}) must(fail_one(step));
  EXPECT_THAT(must_fail(checkpointer.save(9, job.state())).message, HasSubstr("3 failures"));
  must(save_durably(checkpointer, 10, job));
  // A success in between starts it again too.
  must(fail_one(11));
  must(fail_one(12));
  must(save_durably(checkpointer, 13, job));
  must(fail_one(14));
  must(save_durably(checkpointer, 15, job));
  const Error all = must_fail(checkpointer.close());
  for (const char* step : {"step 11", "step 12", "step 14"}) {
    EXPECT_THAT(all.message, HasSubstr(step));
  }
  EXPECT_THAT(all.message, ::testing::Not(HasSubstr("step 8")));
}

TEST_F(Background, WithRaiseTheNextSaveFailsAtOnceAndTheOneAfterSaves) {
  CheckpointerOptions options;
  options.on_error = ErrorPolicy::kRaise;
  Checkpointer checkpointer = open(options);
  Job job(1);
  must(save_durably(checkpointer, 1, job));
  storage_->fail_operation("sync", 1, EIO);
  must(checkpointer.save(2, job.state()));
  must(checkpointer.wait_until_finished(kPatience));
  const Error error = must_fail(checkpointer.save(3, job.state()));
  EXPECT_EQ(error.system_errno, EIO);
  EXPECT_THAT(error.message, HasSubstr("step 2"));
  must(save_durably(checkpointer, 4, job));
  EXPECT_THAT(must(checkpointer.steps()), ElementsAre(1, 4));
  must(checkpointer.close());
}

TEST_F(Background, FourSavesMayBeInFlightAndTheFifthWaitsUntilItsDeadline) {
  CheckpointerOptions options;
  options.memory_wait = std::chrono::milliseconds(200);
  options.host_bytes_max = 64 * kMiB;
  Checkpointer checkpointer = open(options);
  Job job(1);
  hold_at("begin");
  std::vector<Save> saves;
  for (std::int64_t step = 1; step <= checkpoint::kSavesInFlightMax; ++step) {
    saves.push_back(must(checkpointer.save(step, job.state())));
  }
  wait_until_held();
  const Error error = must_fail(must(checkpointer.save(5, job.state())).wait_durable(kAtOnce));
  EXPECT_EQ(error.code, ErrorCode::kTimeout);
  EXPECT_THAT(error.message, HasSubstr("4 earlier saves"));
  let_go();
  for (const Save& save : saves) must(save.wait_durable(kPatience));
  must(save_durably(checkpointer, 5, job));
  EXPECT_THAT(must(checkpointer.steps()), ElementsAre(1, 2, 3, 4, 5));  // In order.
  must(checkpointer.close());
}

TEST_F(Background, TheFifthSaveGetsThePlaceThatBecomesFree) {
  CheckpointerOptions options;
  options.host_bytes_max = 64 * kMiB;
  Checkpointer checkpointer = open(options);
  Job job(1);
  hold_at("begin");
  for (std::int64_t step = 1; step <= checkpoint::kSavesInFlightMax; ++step) {
    must(checkpointer.save(step, job.state()));
  }
  wait_until_held();
  auto fifth = std::async(std::launch::async, [&] { return checkpointer.save(5, job.state()); });
  let_go();
  must(must(fifth.get()).wait_durable(kPatience));
  must(checkpointer.close());
}

TEST_F(Background, WithSkipASaveThatFindsNoRoomIsSkippedAndSaysSo) {
  CheckpointerOptions options;
  options.when_memory_is_full = MemoryPolicy::kSkip;
  options.host_bytes_max = 64 * kMiB;
  Checkpointer checkpointer = open(options);
  Job job(1);
  hold_at("begin");
  for (std::int64_t step = 1; step <= checkpoint::kSavesInFlightMax; ++step) {
    must(checkpointer.save(step, job.state()));
  }
  wait_until_held();
  const Save skipped = must(checkpointer.save(5, job.state()));
  ASSERT_TRUE(skipped.outcome());
  EXPECT_EQ(skipped.outcome()->kind, Outcome::Kind::kSkipped);
  EXPECT_EQ(must(skipped.wait_durable(kAtOnce)).kind, Outcome::Kind::kSkipped);
  EXPECT_TRUE(skipped.progress().ended);
  let_go();
  must(checkpointer.wait_until_finished(kPatience));
  must(save_durably(checkpointer, 5, job));
  must(checkpointer.close());
}

// Bytes that differ everywhere.
std::vector<std::uint32_t> numbers(std::uint64_t bytes, std::uint32_t seed) {
  std::vector<std::uint32_t> memory(bytes / 4);
  for (std::size_t i = 0; i < memory.size(); ++i) {
    memory[i] = static_cast<std::uint32_t>(i) * 2654435761u + seed;
  }
  return memory;
}

TEST_F(Background, WithSkipASaveThatFindsStagingMemoryTakenIsSkipped) {
  CheckpointerOptions options;
  options.when_memory_is_full = MemoryPolicy::kSkip;
  options.host_bytes_max = 3 * kMiB;
  Checkpointer checkpointer = open(options);
  auto memory = numbers(2 * kMiB, 1);
  const StateDict state{{"a", TensorView::of(memory)}};
  hold_at("begin");
  const Save first = must(checkpointer.save(1, state));
  wait_until_held();
  const Save second = must(checkpointer.save(2, state));
  ASSERT_TRUE(second.outcome());
  EXPECT_EQ(second.outcome()->kind, Outcome::Kind::kSkipped);
  let_go();
  must(first.wait_durable(kPatience));
  EXPECT_LE(checkpointer.host_bytes_mapped(), 3 * kMiB);
  must(must(checkpointer.save(2, state)).wait_durable(kPatience));
  must(checkpointer.close());
}

TEST_F(Background, WithWaitASaveThatFindsNoMemoryFailsLikeOneInTheBackground) {
  CheckpointerOptions options;
  options.memory_wait = std::chrono::milliseconds(200);
  options.host_bytes_max = 3 * kMiB;
  Checkpointer checkpointer = open(options);
  auto memory = numbers(2 * kMiB, 1);
  const StateDict state{{"a", TensorView::of(memory)}};
  hold_at("begin");
  const Save first = must(checkpointer.save(1, state));
  wait_until_held();
  for (const std::int64_t step : {2, 3, 4}) {
    const Save late = must(checkpointer.save(step, state));
    ASSERT_TRUE(late.outcome());
    EXPECT_EQ(late.outcome()->kind, Outcome::Kind::kFailed);
    EXPECT_EQ(late.outcome()->cause->code, ErrorCode::kTimeout);
    EXPECT_EQ(must_fail(late.wait_staged(kAtOnce)).code, ErrorCode::kTimeout);
    EXPECT_EQ(late.warnings().size(), step == 2 ? 0u : 1u);
  }
  EXPECT_THAT(must_fail(checkpointer.save(5, state)).message, HasSubstr("3 failures in a row"));
  must(checkpointer.save(5, state));
  EXPECT_EQ(checkpointer.failures().size(), 1u);
  let_go();
  must(first.wait_durable(kPatience));
  must(must(checkpointer.save(2, state)).wait_durable(kPatience));  // The step is free.
  EXPECT_THAT(must_fail(checkpointer.close()).message, HasSubstr("step 5"));
}

TEST_F(Background, AStateAboveTheCeilingStreamsInWavesAndGivesTheSameFiles) {
  auto first = numbers(5 * kMiB + 4, 1);
  auto second = numbers(3 * kMiB, 2);
  const StateDict state{{"model", StateDict{{"a", TensorView::of(first)}}},
                        {"optimizer", StateDict{{"b", TensorView::of(second)}}}};
  CheckpointerOptions options;
  options.host_bytes_max = 2 * kMiB;
  Checkpointer checkpointer = open(options);
  const std::vector<std::uint32_t> at_the_call = first;
  const Save save = must(checkpointer.save(1, state));
  first[0] = 0;  // The call has returned: it may change.
  first.back() = 0;
  must(save.wait_durable(kPatience));
  EXPECT_THAT(save.warnings(), ElementsAre(HasSubstr("waves")));
  EXPECT_LE(checkpointer.host_bytes_mapped(), 2 * kMiB);
  EXPECT_EQ(save.progress().bytes_written, save.progress().bytes_total);
  first = at_the_call;
  Checkpointer whole = must(Checkpointer::open(directory_ / "whole"));
  must(must(whole.save(1, state)).wait_durable(kPatience));

  const Checkpoint waves = must(Checkpoint::open(directory_ / "run/step-00000001"));
  const Checkpoint once = must(Checkpoint::open(directory_ / "whole/step-00000001"));
  EXPECT_THAT(must(waves.verify()), IsEmpty());
  for (const std::uint32_t tensor : {0u, 1u}) {
    EXPECT_EQ(waves.digests(tensor), once.digests(tensor));
  }
  for (const char* name :
       {"model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors"}) {
    EXPECT_EQ(testing::read_text(directory_ / "run/step-00000001" / name),
              testing::read_text(directory_ / "whole/step-00000001" / name));
  }
  must(checkpointer.close());
}

TEST_F(Background, WithoutAnyWaitForEarlierSavesASaveStillWaitsForItsOwnWaves) {
  CheckpointerOptions options;
  options.memory_wait = kAtOnce;
  options.host_bytes_max = 1 * kMiB;
  Checkpointer checkpointer = open(options);
  auto memory = numbers(6 * kMiB, 1);
  const Save save = must(checkpointer.save(1, StateDict{{"a", TensorView::of(memory)}}));
  must(save.wait_durable(kPatience));
  must(checkpointer.close());
}

TEST_F(Background, AStorageThatFailsInTheMiddleOfWavesEndsTheSavePromptly) {
  CheckpointerOptions options;
  options.host_bytes_max = 1 * kMiB;
  Checkpointer checkpointer = open(options);
  auto memory = numbers(6 * kMiB, 1);
  const StateDict state{{"a", TensorView::of(memory)}};
  std::atomic<int> writes = 0;
  storage_->before_each_call([&](const auto& call) {
    if (call.operation == "write_at" && ++writes == 3) storage_->fail_all_after(0, EIO);
  });
  const Save failed = must(checkpointer.save(1, state));  // The disk's fault, not the call's.
  must(checkpointer.wait_until_finished(kPatience));
  ASSERT_EQ(failed.outcome()->kind, Outcome::Kind::kFailed);
  EXPECT_EQ(failed.outcome()->cause->system_errno, EIO);
  storage_->before_each_call(nullptr);
  storage_->clear_faults();
  const Save next = must(checkpointer.save(2, state));
  EXPECT_THAT(next.warnings(), ::testing::Contains(HasSubstr("the save of step 1 failed")));
  must(next.wait_durable(kPatience));
  EXPECT_THAT(names_in(directory_ / "run"), ElementsAre("step-00000002"));
  EXPECT_EQ(must_fail(checkpointer.close()).system_errno, EIO);
}

TEST_F(Background, AnAbsurdNumberOfThreadsIsRefused) {
  CheckpointerOptions options;
  options.copy_threads = 1'000'000;
  const Error error = must_fail(Checkpointer::open(directory_ / "run", options));
  EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(error.message, HasSubstr("copy_threads"));
}

TEST_F(Background, PlainValuesThatNoManifestHoldsAreRefusedBeforeAnythingIsCopied) {
  Checkpointer checkpointer = open();
  const StateDict state{{"small", std::string(10, 'x')},
                        {"blob", Value(Value::Bytes{std::string(50 * kMiB, 'x')})}};
  const Error error = must_fail(checkpointer.save(1, state));
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  EXPECT_EQ(error.key_path, "blob");
  EXPECT_THAT(error.message, HasSubstr("as an array"));
  EXPECT_THAT(names_in(directory_ / "run"), IsEmpty());
}

TEST_F(Background, CloseCancelsWhatDoesNotEndInTime) {
  CheckpointerOptions options;
  options.finish_wait = kAtOnce;
  Checkpointer checkpointer = open(options);
  Job job(1);
  hold_at("sync");
  const Save save = must(checkpointer.save(1, job.state()));
  wait_until_held();
  const Error error = must_fail(checkpointer.close());
  EXPECT_EQ(error.code, ErrorCode::kTimeout);
  EXPECT_EQ(must_fail(checkpointer.save(2, job.state())).code, ErrorCode::kUnavailable);
  Checkpointer next = must(Checkpointer::open(directory_ / "run"));
  EXPECT_EQ(must_fail(next.save(2, job.state())).code, ErrorCode::kUnavailable);
  let_go();
  EXPECT_EQ(must(save.wait_durable(kPatience)).kind, Outcome::Kind::kSkipped);
  EXPECT_THAT(names_in(directory_ / "run"), IsEmpty());
  // The directory is free once the last save has ended.
  must(save_durably(next, 2, job));
  EXPECT_THAT(must(next.steps()), ElementsAre(2));
}

TEST_F(Background, ManyThreadsSaveAndEachSaveCommitsOnce) {
  Checkpointer checkpointer = open();
  std::vector<std::thread> threads;
  std::atomic<int> committed = 0;
  for (std::int64_t thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (std::int64_t i = 0; i < 5; ++i) {
        Job job(thread * 100 + i);
        const auto outcome = save_durably(checkpointer, thread * 100 + i, job);
        if (outcome && outcome->kind == Outcome::Kind::kCommitted) ++committed;
        StateDict state = job.state();
        static_cast<void>(checkpointer.latest_step());
        static_cast<void>(checkpointer.failures());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(committed, 20);
  EXPECT_EQ(must(checkpointer.steps()).size(), 20u);
  for (const StepEntry& entry : must(list_checkpoints(directory_ / "run"))) {
    EXPECT_EQ(content_of(must(load(directory_ / "run" / entry.name)).state),
              content_of(Job(entry.step).state()));
  }
  must(checkpointer.close());
}

TEST_F(Background, CloseGivesStagingMemoryBack) {
  Checkpointer checkpointer = open();
  Job job(1);
  must(save_durably(checkpointer, 1, job));
  EXPECT_GT(checkpointer.host_bytes_mapped(), 0u);
  must(checkpointer.close());
  EXPECT_EQ(checkpointer.host_bytes_mapped(), 0u);
}

// An engine without threads of its own.
class OneThread : public Background {
 protected:
  Checkpointer open_engine(CheckpointerOptions options = {}) {
    checkpoint::Environment environment;
    environment.clock = clock_;
    auto devices = std::make_shared<device::Registry>();
    devices->add(device_);
    environment.devices = devices;
    environment.pipeline = pipeline_;
    return must(CheckpointerAccess::open(storage_, std::move(options), std::move(environment)));
  }

  const std::shared_ptr<testing::ManualClock> clock_ = std::make_shared<testing::ManualClock>();
  const std::shared_ptr<ManualExecutor> pipeline_ = std::make_shared<ManualExecutor>();
  const std::shared_ptr<FakeDevice> device_ = std::make_shared<FakeDevice>();
};

TEST_F(OneThread, RunsTheSameCallsInTheSameOrderEveryTime) {
  std::vector<std::vector<std::string>> logs;
  for (int round = 0; round < 2; ++round) {
    std::filesystem::remove_all(directory_ / "run");
    const std::size_t before = storage_->log().size();
    Checkpointer checkpointer = open_engine();
    Job job(1);
    const Save first = must(checkpointer.save(1, job.state()));
    const Save second = must(checkpointer.save(2, job.state()));
    EXPECT_FALSE(first.outcome());
    EXPECT_EQ(pipeline_->run_all(), 2u);
    EXPECT_EQ(first.outcome()->kind, Outcome::Kind::kCommitted);
    EXPECT_EQ(second.outcome()->kind, Outcome::Kind::kCommitted);
    EXPECT_EQ(first.timings().blocked_ms, 0);  // The clock stands still.
    must(checkpointer.close());
    std::vector<std::string>& log = logs.emplace_back();
    for (const auto& call : storage_->log()) {
      if (call.number <= before) continue;
      std::string name = call.name;
      if (const auto run = name.find(checkpointer.run()); run != std::string::npos) {
        name.replace(run, checkpointer.run().size(), "RUN");
      }
      log.push_back(call.operation + " " + name);
    }
  }
  EXPECT_FALSE(logs[0].empty());
  EXPECT_EQ(logs[0], logs[1]);
}

TEST_F(OneThread, TimingsComeFromTheClockThatWasGiven) {
  Checkpointer checkpointer = open_engine();
  Job job(1);
  storage_->before_each_call([&](const auto& call) {
    if (call.operation == "lock") clock_->advance(std::chrono::milliseconds(40));
    if (call.operation == "publish") clock_->advance(std::chrono::milliseconds(500));
  });
  const Save save = must(checkpointer.save(1, job.state()));
  EXPECT_EQ(save.timings().blocked_ms, 40);
  EXPECT_EQ(save.timings().prepare_ms, 40);
  clock_->advance(std::chrono::seconds(1));
  pipeline_->run_all();
  EXPECT_EQ(save.timings().commit_ms, 500);
  EXPECT_EQ(save.timings().durable_ms, 1540);
  EXPECT_THAT(save.summary(), HasSubstr("blocked 40 ms (collect 0, prepare 40, plan 0, copy 0)"));
  EXPECT_THAT(save.summary(), HasSubstr("durable in 1.54 s"));
}

TEST_F(OneThread, SaveReturnsOnlyWhenTheDeviceHasCopied) {
  Checkpointer checkpointer = open_engine();
  auto memory = numbers(600 << 10, 3);
  const auto at_the_call = memory;
  TensorView view = TensorView::of(memory);
  view.device.kind = "fake";
  std::atomic<bool> returned = false;
  auto saving = std::async(std::launch::async, [&] {
    auto save = checkpointer.save(1, StateDict{{"a", view}});
    returned = true;
    return save;
  });
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  ASSERT_TRUE(device_->wait_for_pending(3, deadline));
  while (device_->pending() > 1) device_->complete_newest();
  EXPECT_FALSE(returned);  // One copy is outstanding.
  device_->complete_all();
  const Save save = must(saving.get());
  std::fill(memory.begin(), memory.end(), 0);
  pipeline_->run_all();
  must(save.wait_durable(kPatience));
  const Loaded loaded = must(load(directory_ / "run"));
  const auto bytes = testing::bytes_of(loaded.state.tensors()[0]);
  EXPECT_EQ(std::memcmp(bytes.data(), at_the_call.data(), bytes.size()), 0);
}

TEST_F(OneThread, AFullDiskThatIsMetWhileSaveStillCopiesFailsTheSaveAndNotTheCall) {
  Checkpointer checkpointer = open_engine();
  auto memory = numbers(1024, 3);
  TensorView view = TensorView::of(memory);
  view.device.kind = "fake";
  storage_->fail_operation("begin", 1, ENOSPC);
  auto saving = std::async(std::launch::async, [&] {
    return checkpointer.save(1, StateDict{{"on_device", view}});
  });
  ASSERT_TRUE(device_->wait_for_pending(1, std::chrono::steady_clock::now() + kPatience));
  EXPECT_EQ(pipeline_->run_all(), 1u);
  device_->complete_all();
  const Save failed = must(saving.get());
  ASSERT_TRUE(failed.outcome());
  EXPECT_EQ(failed.outcome()->kind, Outcome::Kind::kFailed);
  EXPECT_EQ(failed.outcome()->cause->system_errno, ENOSPC);
  EXPECT_EQ(checkpointer.failures().size(), 1u);
  Job job(1);
  const Save next = must(checkpointer.save(1, job.state()));
  EXPECT_THAT(next.warnings(), ElementsAre(HasSubstr("the save of step 1 failed")));
  pipeline_->run_all();
  EXPECT_EQ(next.outcome()->kind, Outcome::Kind::kCommitted);
  EXPECT_EQ(must_fail(checkpointer.close()).system_errno, ENOSPC);
}

TEST_F(OneThread, WhereMemoryRunsOutInTheBackgroundTheSaveFailsAndTheNextCommits) {
  Checkpointer checkpointer = open_engine();
  Job job(1);
  for (const char* operation : {"begin", "create", "write_at", "sync", "publish"}) {
    storage_->before_each_call([&](const auto& call) {
      if (call.operation == operation) throw std::bad_alloc();
    });
    const Save failed = must(checkpointer.save(1, job.state()));
    pipeline_->run_all();
    storage_->before_each_call(nullptr);
    const Error error = must_fail(failed.wait_durable(kAtOnce));
    EXPECT_EQ(error.code, ErrorCode::kMemoryLimit) << operation;
    EXPECT_THAT(error.message, HasSubstr("out of memory while"));
  }
  const Save next = must(checkpointer.save(1, job.state()));
  pipeline_->run_all();
  EXPECT_EQ(next.outcome()->kind, Outcome::Kind::kCommitted);
  must(checkpointer.close());
}

TEST_F(OneThread, WhereMemoryRunsOutInAReadingCallItIsAnErrorAndTheNextCallWorks) {
  Checkpointer checkpointer = open_engine();
  Job job(1);
  must(checkpointer.save(1, job.state()));
  pipeline_->run_all();
  for (const char* operation : {"list", "open", "file_bytes", "read_at"}) {
    StateDict state = job.state();
    bool thrown = false;
    storage_->before_each_call([&](const auto& call) {
      if (call.operation != operation) return;
      thrown = true;
      throw std::bad_alloc();
    });
    const auto restored = checkpointer.restore(state);
    const auto steps = checkpointer.steps();
    storage_->before_each_call(nullptr);
    EXPECT_TRUE(thrown) << operation;
    EXPECT_EQ(must_fail(restored).code, ErrorCode::kMemoryLimit) << operation;
    EXPECT_EQ(must_fail(steps).code, ErrorCode::kMemoryLimit) << operation;
    EXPECT_EQ(must(checkpointer.restore(state))->step, 1);
  }
  must(checkpointer.close());
}

TEST_F(OneThread, ADeviceThatFailsFailsThatSaveWithItsKey) {
  Checkpointer checkpointer = open_engine();
  Job job(1);
  auto memory = numbers(1024, 3);
  TensorView view = TensorView::of(memory);
  view.device.kind = "fake";
  auto saving = std::async(std::launch::async, [&] {
    return checkpointer.save(1, StateDict{{"model", StateDict{{"on_device", view}}}});
  });
  ASSERT_TRUE(device_->wait_for_pending(1, std::chrono::steady_clock::now() + kPatience));
  device_->fail_oldest(Error{.code = ErrorCode::kIo, .message = "the bus is down"});
  const Error error = must_fail(saving.get());
  EXPECT_EQ(error.key_path, "model.on_device");
  EXPECT_THAT(error.text(), HasSubstr("the bus is down"));
  pipeline_->run_all();
  EXPECT_THAT(names_in(directory_ / "run"), IsEmpty());
  const Save next = must(checkpointer.save(1, job.state()));
  pipeline_->run_all();
  EXPECT_EQ(next.outcome()->kind, Outcome::Kind::kCommitted);
  must(checkpointer.close());
}

TEST_F(OneThread, AnUnknownDeviceIsAnErrorWithItsKeyAndNothingIsSaved) {
  Checkpointer checkpointer = open_engine();
  auto memory = numbers(1024, 3);
  TensorView view = TensorView::of(memory);
  view.device.kind = "abacus";
  const Error error =
      must_fail(checkpointer.save(1, StateDict{{"model", StateDict{{"beads", view}}}}));
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  EXPECT_EQ(error.key_path, "model.beads");
  EXPECT_THAT(error.message, HasSubstr("abacus"));
  EXPECT_EQ(pipeline_->queued(), 0u);
  // Nor can it be restored into.
  Job job(1);
  StateDict saved{{"model", StateDict{{"beads", TensorView::of(memory)}}}};
  must(checkpointer.save(1, saved));
  pipeline_->run_all();
  StateDict state{{"model", StateDict{{"beads", view}}}};
  const Error refused = must_fail(checkpointer.restore(state));
  EXPECT_EQ(refused.code, ErrorCode::kUnsupported);
  EXPECT_EQ(refused.key_path, "model.beads");
  must(checkpointer.close());
}

}  // namespace
}  // namespace strandline
