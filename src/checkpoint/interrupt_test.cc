// Saves that their caller gives up while they wait: nothing is saved, nothing stays behind, and
// the engine goes on.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/pipeline.h"
#include "strandline/checkpointer.h"
#include "testing/fault_injecting_storage.h"
#include "testing/temporary_directory.h"

namespace strandline {
namespace {

using ::testing::ElementsAre;
using testing::FaultInjectingStorage;
using ::testing::HasSubstr;

constexpr std::chrono::seconds kPatience{60};
constexpr std::uint64_t kMiB = 1 << 20;

SaveOptions interrupted_by(std::function<bool()> interrupted) {
  SaveOptions options;
  options.interrupted = std::move(interrupted);
  return options;
}

const std::function<bool()> kAtOnce = [] { return true; };

std::vector<std::string> names_in(const std::filesystem::path& directory) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.path().filename() != ".lock") names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// A Checkpointer whose writing is stopped until let_go().
class Interrupt : public ::testing::Test {
 protected:
  Interrupt() {
    storage_ = std::make_shared<FaultInjectingStorage>(*open_posix_storage(directory_.path()));
    storage_->before_each_call([this, gate = release_.get_future().share()](const auto& call) {
      if (call.operation != "begin" || held_.exchange(true)) return;
      gate.wait_for(kPatience);  // A test that failed meanwhile does not let go.
    });
  }

  Checkpointer open(std::uint64_t host_bytes_max = 64 * kMiB) {
    return Checkpointer::open(storage_, {.host_bytes_max = host_bytes_max}).value();
  }
  void let_go() { release_.set_value(); }

  // A save of another thread, when it is waiting.
  static std::future<Result<Save>> saving(Checkpointer& checkpointer, std::int64_t step,
                                          const StateDict& state) {
    auto waiting = std::make_shared<std::promise<void>>();
    auto asked = std::make_shared<std::atomic<bool>>(false);
    auto save = std::async(std::launch::async, [=, &checkpointer, &state] {
      return checkpointer.save(step, state, interrupted_by([=] {
                                 if (!asked->exchange(true)) waiting->set_value();
                                 return false;
                               }));
    });
    EXPECT_EQ(waiting->get_future().wait_for(kPatience), std::future_status::ready);
    return save;
  }

  static Outcome::Kind end_of(const Result<Save>& save) {
    return save.value().wait_durable(kPatience).value().kind;
  }

  const testing::TemporaryDirectory directory_;
  std::shared_ptr<FaultInjectingStorage> storage_;
  std::promise<void> release_;
  std::atomic<bool> held_{false};
  std::vector<std::uint8_t> large_ = std::vector<std::uint8_t>(3 * kMiB, 7);
  std::vector<std::uint8_t> small_ = std::vector<std::uint8_t>(1000, 7);
  const StateDict large_state_{{"a", TensorView::of(large_)}};
  const StateDict small_state_{{"a", TensorView::of(small_)}};
};

TEST_F(Interrupt, EndsTheWaitForAPlaceInThePipeline) {
  Checkpointer checkpointer = open();
  std::vector<Result<Save>> saves;
  for (std::int64_t step = 1; step <= checkpoint::kSavesInFlightMax; ++step) {
    saves.push_back(checkpointer.save(step, small_state_));
  }
  const auto refused = checkpointer.save(5, small_state_, interrupted_by(kAtOnce));
  EXPECT_EQ(refused.error().code, ErrorCode::kUnavailable);
  EXPECT_THAT(refused.error().message, HasSubstr("interrupted"));
  let_go();
  for (const auto& save : saves) EXPECT_EQ(end_of(save), Outcome::Kind::kCommitted);
  EXPECT_EQ(end_of(checkpointer.save(5, small_state_)), Outcome::Kind::kCommitted);
  EXPECT_TRUE(checkpointer.close());
}

TEST_F(Interrupt, EndsTheWaitForMemoryAndTheStepIsFree) {
  Checkpointer checkpointer = open(4 * kMiB);
  const auto first = checkpointer.save(1, large_state_);
  const auto refused = checkpointer.save(2, large_state_, interrupted_by(kAtOnce));
  EXPECT_EQ(refused.error().code, ErrorCode::kUnavailable);
  let_go();
  EXPECT_EQ(end_of(first), Outcome::Kind::kCommitted);
  EXPECT_THAT(*checkpointer.steps(), ElementsAre(1));
  EXPECT_EQ(end_of(checkpointer.save(2, large_state_)), Outcome::Kind::kCommitted);
  EXPECT_TRUE(checkpointer.failures().empty());
  EXPECT_TRUE(checkpointer.close());
  EXPECT_THAT(names_in(directory_.path()), ElementsAre("step-00000001", "step-00000002"));
}

TEST_F(Interrupt, EndsASaveInWavesThatThePipelineHasAlready) {
  Checkpointer checkpointer = open(2 * kMiB);
  const auto refused = checkpointer.save(1, large_state_, interrupted_by(kAtOnce));
  EXPECT_EQ(refused.error().code, ErrorCode::kUnavailable);
  EXPECT_THAT(refused.error().message, HasSubstr("interrupted"));
  let_go();
  ASSERT_TRUE(checkpointer.wait_until_finished(kPatience));
  EXPECT_TRUE(checkpointer.failures().empty());
  EXPECT_EQ(end_of(checkpointer.save(1, large_state_)), Outcome::Kind::kCommitted);
  EXPECT_TRUE(checkpointer.close());
  EXPECT_THAT(names_in(directory_.path()), ElementsAre("step-00000001"));
}

TEST_F(Interrupt, TheStepMayBeSavedAgainWhileThePipelineStillHasTheFirstOne) {
  Checkpointer checkpointer = open(2 * kMiB);
  EXPECT_FALSE(checkpointer.save(1, large_state_, interrupted_by(kAtOnce)));
  auto again = saving(checkpointer, 1, small_state_);  // Waits for the first one's memory.
  let_go();
  // The end of the first one does not free the step, which is the second one's now.
  EXPECT_EQ(end_of(again.get()), Outcome::Kind::kCommitted);
  EXPECT_EQ(checkpointer.save(1, small_state_).error().code, ErrorCode::kAlreadyExists);
  EXPECT_TRUE(checkpointer.close());
}

TEST_F(Interrupt, EndsTheWaitForTheSaveOfAnotherThread) {
  Checkpointer checkpointer = open(4 * kMiB);
  const auto first = checkpointer.save(1, large_state_);
  auto second = saving(checkpointer, 2, large_state_);
  const auto refused = checkpointer.save(3, small_state_, interrupted_by(kAtOnce));
  EXPECT_EQ(refused.error().code, ErrorCode::kUnavailable);
  let_go();
  EXPECT_EQ(end_of(first), Outcome::Kind::kCommitted);
  EXPECT_EQ(end_of(second.get()), Outcome::Kind::kCommitted);
  EXPECT_TRUE(checkpointer.close());
}

TEST_F(Interrupt, WhatTheQuestionRunsCannotWaitForTheSaveThatAsks) {
  Checkpointer checkpointer = open(4 * kMiB);
  const auto first = checkpointer.save(1, large_state_);
  std::vector<std::string> refusals;
  const auto asked = [&] {
    const auto refused = [&](const auto& result) {
      EXPECT_EQ(result.error().code, ErrorCode::kUnavailable);
      refusals.push_back(result.error().message);
    };
    StateDict state = small_state_;
    refused(checkpointer.save(7, state));
    refused(checkpointer.restore(state));
    refused(checkpointer.wait_until_finished(kPatience));
    refused(checkpointer.close());
    EXPECT_FALSE(first->outcome());  // What does not wait for the save works.
    EXPECT_TRUE(checkpointer.steps()->empty());
    return true;
  };
  EXPECT_FALSE(checkpointer.save(2, large_state_, interrupted_by(asked)));
  ASSERT_EQ(refusals.size(), 4u);
  for (const std::string& text : refusals) EXPECT_THAT(text, HasSubstr("waiting on this thread"));
  let_go();
  EXPECT_EQ(end_of(checkpointer.save(2, large_state_)), Outcome::Kind::kCommitted);
  EXPECT_TRUE(checkpointer.close());
}

TEST_F(Interrupt, IsNotAskedWhereNothingIsWaitedFor) {
  Checkpointer checkpointer = open();
  let_go();
  EXPECT_EQ(end_of(checkpointer.save(1, large_state_, interrupted_by(kAtOnce))),
            Outcome::Kind::kCommitted);
}

TEST(InterruptOnce, LeavesTheOldCheckpointAndNothingElse) {
  const testing::TemporaryDirectory directory;
  std::vector<std::uint8_t> before(100, 1);
  ASSERT_TRUE(save(directory / "one", StateDict{{"a", TensorView::of(before)}}));
  // Nothing can hold this writer; so it gets more to write until it is still at it when the caller
  // is asked for the first time.
  Status given_up;
  std::uint64_t expected = before.size();
  for (std::uint64_t bytes = 64 * kMiB; given_up && bytes <= 1024 * kMiB; bytes *= 2) {
    std::vector<std::uint8_t> large(bytes, 2);
    given_up =
        save(directory / "one", StateDict{{"a", TensorView::of(large)}}, interrupted_by(kAtOnce));
    if (given_up) expected = bytes;
    const auto loaded = load(directory / "one");
    ASSERT_TRUE(loaded) << loaded.error().text();
    EXPECT_EQ(loaded->state.tensors()[0].byte_count(), expected);
  }
  ASSERT_FALSE(given_up) << "everything was written before anybody was asked";
  EXPECT_EQ(given_up.error().code, ErrorCode::kUnavailable);
  EXPECT_THAT(given_up.error().message, HasSubstr("interrupted"));
  EXPECT_THAT(names_in(directory.path()), ElementsAre("one"));
  EXPECT_TRUE(save(directory / "one", StateDict{{"a", TensorView::of(before)}}));
}

}  // namespace
}  // namespace strandline
