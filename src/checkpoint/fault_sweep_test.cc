// Every call to the storage fails once: nothing is lost, nothing hangs, the next save commits.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <set>

#include "strandline/checkpointer.h"
#include "testing/checkpoint_fixture.h"

namespace strandline {
namespace {

using testing::content_of;
using ::testing::ElementsAre;
using testing::FaultInjectingStorage;
using ::testing::HasSubstr;
using testing::Job;
using testing::kPatience;
using testing::must;
using testing::must_fail;
using testing::TemporaryDirectory;

enum class Fault { kOneCall, kAllFromThere };

// A save that meets a fault, in a directory where another run has committed step 1.
struct Sweep {
  Fault fault = Fault::kOneCall;
  std::int64_t step = 2;  // What the failing save saves; 1 is an overwrite.
  CheckpointerOptions options;
  std::vector<std::int64_t> committed_before{1};
};

std::vector<std::string> newest_content(const std::filesystem::path& directory) {
  Checkpointer reader = must(Checkpointer::open(directory));
  Job job(99);
  StateDict state = job.state();
  const auto restored = must(reader.restore(state));
  if (!restored) return {};
  EXPECT_TRUE(restored->warnings.empty()) << restored->warnings.front();
  return content_of(state);
}

// Commits are told apart by their sequences, and the newest is `step`.
void expect_newest(const std::filesystem::path& directory, std::int64_t step) {
  const std::vector<StepEntry> entries = must(list_checkpoints(directory));
  std::set<std::uint64_t> sequences;
  for (const StepEntry& entry : entries) {
    ASSERT_TRUE(entry.info) << entry.name;
    EXPECT_TRUE(sequences.insert(entry.info->sequence).second) << entry.name;
  }
  ASSERT_FALSE(entries.empty());
  EXPECT_EQ(entries.back().step, step);
}

// Returns false once call `n` was never made.
bool run_with_fault_at(const Sweep& sweep, std::uint64_t n) {
  SCOPED_TRACE("call " + std::to_string(n));
  const TemporaryDirectory directory;
  testing::commit_steps(directory.path(), sweep.committed_before);
  const auto storage = testing::faulty_storage(directory.path());
  Checkpointer checkpointer = must(Checkpointer::open(storage, sweep.options));
  if (!sweep.committed_before.empty()) {
    Job job(98);
    StateDict state = job.state();
    EXPECT_TRUE(must(checkpointer.restore(state)));
  }
  const std::uint64_t before = storage->calls();
  if (sweep.fault == Fault::kOneCall) {
    storage->fail_call(before + n, EIO);
  } else {
    storage->fail_all_after(before + n - 1, ENOSPC);
  }

  Job previous(sweep.committed_before.empty() ? 0 : sweep.committed_before.back());
  Job job(20);
  SaveOptions options;
  options.overwrite = sweep.step == 1;
  const Result<Save> save = checkpointer.save(sweep.step, job.state(), options);
  bool committed = false;
  if (save) {
    const Result<Outcome> outcome = save->wait_durable(kPatience);
    EXPECT_TRUE(save->outcome());
    committed = outcome && outcome->kind == Outcome::Kind::kCommitted;
    if (!outcome) {
      EXPECT_EQ(save->outcome()->kind, Outcome::Kind::kFailed);
      EXPECT_NE(outcome.error().code, ErrorCode::kTimeout) << outcome.error().text();
    }
  } else {
    EXPECT_EQ(save.error().code, ErrorCode::kIo) << save.error().text();
  }
  must(checkpointer.wait_until_finished(kPatience));
  const bool reached = storage->calls() >= before + n;
  EXPECT_TRUE(committed || reached) << "failed without a fault";
  storage->clear_faults();

  const std::vector<std::string> newest = newest_content(directory.path());
  const bool is_new = newest == content_of(job);
  EXPECT_TRUE(is_new || !committed);
  if (!is_new) {
    EXPECT_EQ(newest,
              sweep.committed_before.empty() ? std::vector<std::string>() : content_of(previous));
  }

  Job next(30);
  EXPECT_TRUE(testing::save_durably(checkpointer, 3, next));
  EXPECT_EQ(newest_content(directory.path()), content_of(next));
  expect_newest(directory.path(), 3);
  if (sweep.options.keep) {
    EXPECT_EQ(testing::names_in(directory.path()).size(), 1u);
  }
  for (const std::string& name : testing::names_in(directory.path())) {
    EXPECT_NE(name.front(), '.') << name;
  }
  static_cast<void>(checkpointer.close());
  return reached;
}

void run(const Sweep& sweep, std::uint64_t calls_min) {
  std::uint64_t n = 1;
  while (run_with_fault_at(sweep, n) && !::testing::Test::HasFailure()) ++n;
  EXPECT_GT(n, calls_min);
}

TEST(FaultSweep, AnyFailingCallOfTheFirstSaveLosesNothing) { run({}, 30); }

TEST(FaultSweep, AnyFailingCallWithNothingCommittedBefore) {
  Sweep sweep;
  sweep.committed_before = {};
  run(sweep, 30);
}

TEST(FaultSweep, AStorageThatGoesAwayAtAnyCallLosesNothing) {
  Sweep sweep;
  sweep.fault = Fault::kAllFromThere;
  run(sweep, 30);
}

TEST(FaultSweep, TheLastGoodCheckpointIsNeverLostWhenOnlyOneIsKept) {
  Sweep sweep;
  sweep.options.keep = 1;
  sweep.committed_before = {4, 1};
  run(sweep, 30);
  sweep.fault = Fault::kAllFromThere;
  run(sweep, 30);
}

TEST(FaultSweep, OverwritingAStepLeavesTheOldOrTheNewInFull) {
  Sweep sweep;
  sweep.step = 1;
  run(sweep, 30);
  sweep.fault = Fault::kAllFromThere;
  run(sweep, 30);
}

TEST(FaultSweep, WithTheDataReadBackToo) {
  Sweep sweep;
  sweep.options.verify_data = true;
  sweep.options.keep = 1;
  run(sweep, 30);
}

TEST(FaultSweep, AStepThatMayNotSurviveAPowerCutFailsButStaysVisibleAndPrunesNothing) {
  const TemporaryDirectory directory;
  testing::commit_steps(directory.path(), {1, 2});
  const auto storage = testing::faulty_storage(directory.path());
  CheckpointerOptions options;
  options.keep = 1;
  Checkpointer checkpointer = must(Checkpointer::open(storage, options));
  storage->fail_durability(EIO);
  Job job(3);
  const Save save = must(checkpointer.save(3, job.state()));
  const Error error = must_fail(save.wait_durable(kPatience));
  EXPECT_EQ(error.code, ErrorCode::kIo);
  EXPECT_EQ(error.system_errno, EIO);
  EXPECT_THAT(error.message, HasSubstr("power cut"));
  EXPECT_EQ(save.outcome()->kind, Outcome::Kind::kFailed);
  EXPECT_THAT(must(checkpointer.steps()), ElementsAre(1, 2, 3));
  EXPECT_EQ(newest_content(directory.path()), content_of(job));
  // It counts as existing.
  EXPECT_EQ(must_fail(checkpointer.save(3, job.state())).code, ErrorCode::kAlreadyExists);
  storage->clear_faults();
  must(testing::save_durably(checkpointer, 4, job));
  EXPECT_THAT(must(checkpointer.steps()), ElementsAre(4));
  must(checkpointer.close());
}

TEST(FaultSweep, WhatCannotBePrunedIsAWarningAndGoesNextTime) {
  const TemporaryDirectory directory;
  const auto storage = testing::faulty_storage(directory.path());
  CheckpointerOptions options;
  options.keep = 1;
  Checkpointer checkpointer = must(Checkpointer::open(storage, options));
  Job job(1);
  must(testing::save_durably(checkpointer, 1, job));
  storage->fail_operation("remove", 1, EACCES);
  const Save save = must(checkpointer.save(2, job.state()));
  EXPECT_EQ(must(save.wait_durable(kPatience)).kind, Outcome::Kind::kCommitted);
  ASSERT_EQ(save.warnings().size(), 1u);
  EXPECT_THAT(save.warnings().front(), HasSubstr("step 1 was not pruned"));
  EXPECT_THAT(must(checkpointer.steps()), ElementsAre(1, 2));
  must(testing::save_durably(checkpointer, 3, job));
  EXPECT_THAT(must(checkpointer.steps()), ElementsAre(3));
}

// A state of several waves.
struct LargeState {
  explicit LargeState(std::uint32_t seed) {
    for (std::size_t i = 0; i < memory.size(); ++i) {
      memory[i] = static_cast<std::uint32_t>(i) * 2654435761u + seed;
    }
  }
  StateDict state() {
    return StateDict{{"model", StateDict{{"a", TensorView::of(memory)}}}, {"seed", memory[0]}};
  }
  bool is_newest_in(const std::filesystem::path& directory) {
    const Loaded loaded = must(load(directory));
    return testing::bytes_of(loaded.state.tensors()[0]) ==
               testing::bytes_of(TensorView::of(memory)) &&
           loaded.state.values()[0].identical(memory[0]);
  }
  std::vector<std::uint32_t> memory = std::vector<std::uint32_t>((3u << 18) + 321);  // 3 MiB.
};

TEST(FaultSweep, AStateInWavesEndsPromptlyAtAnyFailingCall) {
  const TemporaryDirectory directory;
  const auto storage = testing::faulty_storage(directory.path());
  CheckpointerOptions options;
  options.host_bytes_max = 1 << 20;
  options.keep = 1;
  Checkpointer checkpointer = must(Checkpointer::open(storage, options));
  LargeState good(1);
  must(must(checkpointer.save(1, good.state())).wait_durable(kPatience));
  LargeState bad(2);
  bool reached = true;
  std::uint64_t n = 1;
  for (; reached && !HasFailure(); ++n) {
    SCOPED_TRACE("call " + std::to_string(n));
    const std::uint64_t before = storage->calls();
    storage->fail_call(before + n, EIO);
    SaveOptions overwrite;
    overwrite.overwrite = true;
    const Result<Save> save = checkpointer.save(2, bad.state(), overwrite);
    if (save) static_cast<void>(save->wait_durable(kPatience));
    must(checkpointer.wait_until_finished(kPatience));
    reached = storage->calls() >= before + n;
    storage->clear_faults();
    EXPECT_TRUE(good.is_newest_in(directory.path()) || bad.is_newest_in(directory.path()));
    must(must(checkpointer.save(1, good.state(), overwrite)).wait_durable(kPatience));
    EXPECT_TRUE(good.is_newest_in(directory.path()));
    EXPECT_EQ(testing::names_in(directory.path()).size(), 1u);
  }
  EXPECT_GT(n, 20u);
  must(checkpointer.close());
}

}  // namespace
}  // namespace strandline
