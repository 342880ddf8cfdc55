// Which step is newest, what may be replaced, what goes, who may write.

#include <gmock/gmock.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <functional>
#include <future>

#include "checkpoint/environment.h"
#include "strandline/checkpointer.h"
#include "testing/checkpoint_fixture.h"
#include "testing/manual_executor.h"

namespace strandline {
namespace {

using testing::commit_steps;
using testing::content_of;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::Job;
using testing::kPatience;
using testing::must;
using testing::must_fail;
using testing::names_in;
using testing::read_text;
using testing::save_durably;
using testing::TemporaryDirectory;
using testing::write_text;

SaveOptions overwrite() {
  SaveOptions options;
  options.overwrite = true;
  return options;
}

CheckpointInfo info_of(const std::filesystem::path& step) {
  return must(Checkpoint::open(step)).info();
}

std::int64_t restore_newest(Checkpointer& checkpointer) {
  Job job(99);
  StateDict state = job.state();
  const auto restored = must(checkpointer.restore(state));
  return restored ? restored->step : -1;
}

std::int64_t restore_step(Checkpointer& checkpointer, std::int64_t step) {
  Job job(99);
  StateDict state = job.state();
  RestoreOptions options;
  options.step = step;
  return must(checkpointer.restore(state, options))->step;
}

// Saves and gives the handle once it is committed.
Save commit(Checkpointer& checkpointer, std::int64_t step, const SaveOptions& options = {}) {
  Job job(step);
  const Save save = must(checkpointer.save(step, job.state(), options));
  EXPECT_EQ(must(save.wait_durable(kPatience)).kind, Outcome::Kind::kCommitted);
  return save;
}

void damage_data(const std::filesystem::path& step) {
  const auto path = step / "state-00001-of-00001.safetensors";
  std::string text = read_text(path);
  text.back() = static_cast<char>(text.back() ^ 1);
  write_text(path, text);
}

TEST(Sequence, CountsCommitsAndNamesTheParent) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {10, 20});
  EXPECT_EQ(info_of(directory / "step-00000010").sequence, 1u);
  EXPECT_EQ(info_of(directory / "step-00000010").parent, std::nullopt);
  EXPECT_EQ(info_of(directory / "step-00000020").sequence, 2u);
  EXPECT_EQ(info_of(directory / "step-00000020").parent, 1u);

  Checkpointer next = must(Checkpointer::open(directory.path()));
  EXPECT_EQ(restore_step(next, 10), 10);
  commit(next, 15);
  EXPECT_EQ(info_of(directory / "step-00000015").sequence, 3u);
  EXPECT_EQ(info_of(directory / "step-00000015").parent, 1u);
  EXPECT_EQ(info_of(directory / "step-00000015").run, next.run());
}

TEST(Sequence, NewestIsTheLastCommittedNotTheHighestStep) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {30, 10, 20});
  Checkpointer reader = must(Checkpointer::open(directory.path()));
  EXPECT_THAT(must(reader.steps()), ElementsAre(30, 10, 20));
  EXPECT_EQ(must(reader.latest_step()), 20);
  EXPECT_EQ(restore_newest(reader), 20);
  EXPECT_EQ(must(load(directory.path())).step, 20);
}

TEST(Sequence, AStepThatIsOverwrittenBecomesTheNewest) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2});
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  commit(checkpointer, 1, overwrite());
  EXPECT_THAT(must(checkpointer.steps()), ElementsAre(2, 1));
}

TEST(Sequence, ARestoreWaitsForSavesThatAreOnTheirWay) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1});
  const auto storage = testing::faulty_storage(directory.path());
  Checkpointer checkpointer = must(Checkpointer::open(storage));
  std::promise<void> publishing;
  std::promise<void> go_on;
  storage->before_each_call([&](const auto& call) {
    if (call.operation != "publish") return;
    publishing.set_value();
    go_on.get_future().wait_for(kPatience);
  });
  Job job(2);
  must(checkpointer.save(2, job.state()));
  ASSERT_EQ(publishing.get_future().wait_for(kPatience), std::future_status::ready);
  auto restored = std::async(std::launch::async, [&] { return restore_newest(checkpointer); });
  EXPECT_EQ(restored.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  go_on.set_value();
  EXPECT_EQ(restored.get(), 2);
  storage->before_each_call(nullptr);
  commit(checkpointer, 3);
  EXPECT_EQ(info_of(directory / "step-00000003").parent, 2u);
}

TEST(Sequence, ACommitComesAfterItsParentEvenIfThatWasRemovedMeanwhile) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2, 3});
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  EXPECT_EQ(restore_newest(checkpointer), 3);
  for (const std::string& name : names_in(directory.path())) {
    std::filesystem::remove_all(directory / name);
  }
  commit(checkpointer, 4);
  EXPECT_EQ(info_of(directory / "step-00000004").sequence, 4u);
  EXPECT_EQ(info_of(directory / "step-00000004").parent, 3u);
}

TEST(Retention, KeepsTheLastCommitsBySequence) {
  const TemporaryDirectory directory;
  CheckpointerOptions options;
  options.keep = 2;
  commit_steps(directory.path(), {50, 10, 40, 20}, options);
  EXPECT_THAT(names_in(directory.path()), ElementsAre("step-00000020", "step-00000040"));
}

TEST(Retention, CountsTheStepsOfOlderRunsToo) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2, 3});
  CheckpointerOptions options;
  options.keep = 2;
  commit_steps(directory.path(), {4}, options);
  EXPECT_THAT(names_in(directory.path()), ElementsAre("step-00000003", "step-00000004"));
}

TEST(Retention, LeavesUnreadableStepsAndForeignFilesAlone) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2});
  write_text(directory / "step-00000001/manifest.json", "{}");
  write_text(directory / "notes.txt", "mine");
  std::filesystem::create_directory(directory / "step-x");
  CheckpointerOptions options;
  options.keep = 1;
  commit_steps(directory.path(), {3}, options);
  EXPECT_THAT(names_in(directory.path()),
              ElementsAre("notes.txt", "step-00000001", "step-00000003", "step-x"));
}

TEST(Replacing, AStepOfThisRunIsRefusedWithoutOverwrite) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  commit(checkpointer, 1);
  Job job(2);
  const Error error = must_fail(checkpointer.save(1, job.state()));
  EXPECT_EQ(error.code, ErrorCode::kAlreadyExists);
  EXPECT_THAT(error.message, HasSubstr("overwrite"));
  EXPECT_EQ(error.path, (directory / "step-00000001").string());
  EXPECT_EQ(content_of(must(load(directory.path())).state), content_of(Job(1).state()));
  must(save_durably(checkpointer, 1, job, overwrite()));
  EXPECT_EQ(content_of(must(load(directory.path())).state), content_of(job));
  EXPECT_THAT(names_in(directory.path()), ElementsAre("step-00000001"));
  must(checkpointer.close());  // What save() refused is not a failure in the background.
}

TEST(Replacing, AStepThatIsStillBeingSavedIsRefusedWithoutOverwrite) {
  const TemporaryDirectory directory;
  const auto storage = testing::faulty_storage(directory.path());
  Checkpointer checkpointer = must(Checkpointer::open(storage));
  std::optional<Error> refused;
  Job other(2);
  storage->before_each_call([&](const auto& call) {
    if (call.operation != "publish" || refused) return;
    refused = Error{};
    refused = must_fail(checkpointer.save(1, other.state()));
  });
  commit(checkpointer, 1);
  ASSERT_TRUE(refused);
  EXPECT_EQ(refused->code, ErrorCode::kAlreadyExists);
}

TEST(Replacing, AnAncestorIsRefusedAndAnAbandonedBranchIsReplacedAndReported) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2, 3});
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  EXPECT_EQ(restore_step(checkpointer, 2), 2);
  Job job(50);
  for (const std::int64_t ancestor : {1, 2}) {
    EXPECT_EQ(must_fail(checkpointer.save(ancestor, job.state())).code, ErrorCode::kAlreadyExists)
        << ancestor;
  }
  const Save save = commit(checkpointer, 3);
  ASSERT_EQ(save.warnings().size(), 1u);
  EXPECT_THAT(save.warnings().front(), HasSubstr("does not descend from"));
  EXPECT_THAT(save.warnings().front(), HasSubstr((directory / "step-00000003").string()));
  EXPECT_EQ(info_of(directory / "step-00000003").parent, 2u);
  EXPECT_EQ(info_of(directory / "step-00000003").sequence, 4u);
}

TEST(Replacing, AWriterThatRestoredNothingMayReplaceOlderRunsSteps) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2});
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  const Save save = commit(checkpointer, 1);
  EXPECT_THAT(save.warnings(), ElementsAre(HasSubstr("is replaced")));
  EXPECT_EQ(info_of(directory / "step-00000001").parent, std::nullopt);
  EXPECT_EQ(restore_newest(checkpointer), 1);
  EXPECT_EQ(must_fail(checkpointer.save(1, Job(1).state())).code, ErrorCode::kAlreadyExists);
}

TEST(Replacing, ADamagedAncestorIsReplacedAndReported) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2, 3});
  damage_data(directory / "step-00000001");
  write_text(directory / "step-00000002/manifest.json", "{}");
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  EXPECT_EQ(restore_newest(checkpointer), 3);
  EXPECT_THAT(commit(checkpointer, 1).warnings(),
              ElementsAre(HasSubstr("damaged and is replaced")));
  EXPECT_THAT(commit(checkpointer, 2).warnings(),
              ElementsAre(HasSubstr("unreadable and is replaced")));
  EXPECT_THAT(must(checkpointer.steps()), ElementsAre(3, 1, 2));
  for (const char* name : {"step-00000001", "step-00000002", "step-00000003"}) {
    EXPECT_THAT(must(must(Checkpoint::open(directory / name)).verify()), IsEmpty()) << name;
  }
}

TEST(Replacing, AStepThatCannotBeReadJustNowIsNotGivenUp) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2});
  const auto storage = testing::faulty_storage(directory.path());
  Checkpointer checkpointer = must(Checkpointer::open(storage));
  EXPECT_EQ(restore_newest(checkpointer), 2);
  commit(checkpointer, 3);
  // Unreadable for now (EIO) is not damaged.
  storage->before_each_call([&](const auto& call) {
    if (call.operation == "read_at" && call.name == "step-00000001/manifest.json") {
      storage->fail_call(call.number, EIO);
    }
  });
  Job job(4);
  const Error error = must_fail(checkpointer.save(1, job.state()));
  EXPECT_EQ(error.code, ErrorCode::kIo);
  EXPECT_EQ(error.system_errno, EIO);
  storage->before_each_call(nullptr);
  EXPECT_EQ(content_of(must(load(directory / "step-00000001")).state), content_of(Job(1).state()));
}

TEST(Replacing, WhatIsNoCheckpointIsNeverReplacedNorDeleted) {
  const TemporaryDirectory directory;
  write_text(directory / "step-00000001", "precious");
  std::filesystem::create_directories(directory / "step-00000002");
  write_text(directory / "step-00000002/precious.txt", "precious");
  std::filesystem::create_directory_symlink(directory / "nowhere", directory / "step-00000003");
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  Job job(4);
  for (const std::int64_t step : {1, 2, 3}) {
    for (const SaveOptions& options : {SaveOptions(), overwrite()}) {
      const Error error = must_fail(checkpointer.save(step, job.state(), options));
      EXPECT_EQ(error.code, ErrorCode::kAlreadyExists) << step;
      EXPECT_THAT(error.message, HasSubstr("move it away")) << step;
      EXPECT_THAT(error.message, HasSubstr(fmt::format("step-{:08}", step))) << step;
    }
  }
  EXPECT_EQ(read_text(directory / "step-00000001"), "precious");
  EXPECT_EQ(read_text(directory / "step-00000002/precious.txt"), "precious");
  EXPECT_TRUE(std::filesystem::is_symlink(directory / "step-00000003"));
  commit(checkpointer, 4);
}

TEST(Replacing, TheRemainsOfAStepAreReplaced) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2});
  std::filesystem::remove(directory / "step-00000001/manifest.json");
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  EXPECT_EQ(restore_newest(checkpointer), 2);
  commit(checkpointer, 1);
  EXPECT_THAT(must(must(Checkpoint::open(directory / "step-00000001")).verify()), IsEmpty());
}

TEST(Replacing, AnAncestorWhoseDataCannotBeReadJustNowIsNotGivenUp) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2});
  const auto storage = testing::faulty_storage(directory.path());
  Checkpointer checkpointer = must(Checkpointer::open(storage));
  EXPECT_EQ(restore_newest(checkpointer), 2);
  storage->before_each_call([&](const auto& call) {
    const bool data = call.name == "step-00000001/state-00001-of-00001.safetensors";
    if (call.operation == "read_at" && data) storage->fail_call(call.number, EMFILE);
  });
  Job job(50);
  const Error error = must_fail(checkpointer.save(1, job.state()));
  EXPECT_EQ(error.system_errno, EMFILE) << error.text();
  storage->before_each_call(nullptr);
  EXPECT_EQ(must_fail(checkpointer.save(1, job.state())).code, ErrorCode::kAlreadyExists);
}

TEST(Replacing, AnIntactAncestorIsNotReplacedForAFileThatSomebodyAdded) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2});
  write_text(directory / "step-00000001/notes.txt", "precious");
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  EXPECT_EQ(restore_newest(checkpointer), 2);
  Job job(3);
  EXPECT_EQ(must_fail(checkpointer.save(1, job.state())).code, ErrorCode::kAlreadyExists);
  EXPECT_EQ(read_text(directory / "step-00000001/notes.txt"), "precious");
}

TEST(Leftovers, WhatADeadRunPlantedNeverReachesACommit) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  const std::filesystem::path old = directory / ".step-00000001.partial-0123456789abcdef";
  const std::filesystem::path own = directory / (".step-00000001.partial-" + checkpointer.run());
  for (const std::filesystem::path& partial : {old, own}) {
    std::filesystem::create_directory(partial);
    write_text(partial / "planted.safetensors", "evil");
    write_text(partial / "manifest.json", "evil");
    write_text(partial / "config.json", "evil");
  }
  commit(checkpointer, 1);
  EXPECT_THAT(names_in(directory.path()), ElementsAre("step-00000001"));
  const std::vector<std::string> names = names_in(directory / "step-00000001");
  EXPECT_THAT(names, ::testing::Not(::testing::Contains("planted.safetensors")));
  EXPECT_THAT(names, ::testing::Not(::testing::Contains("config.json")));
  EXPECT_EQ(content_of(must(load(directory.path())).state), content_of(Job(1).state()));
}

TEST(Leftovers, AFilePlantedWhileASaveIsWrittenFailsThatSaveOnly) {
  const TemporaryDirectory directory;
  const auto storage = testing::faulty_storage(directory.path());
  Checkpointer checkpointer = must(Checkpointer::open(storage));
  const auto partial = directory / (".step-00000001.partial-" + checkpointer.run());
  storage->before_each_call([&](const auto& call) {
    if (call.operation == "list_partial") write_text(partial / "planted", "evil");
  });
  Job job(1);
  const Error error = must_fail(save_durably(checkpointer, 1, job));
  EXPECT_THAT(error.message, HasSubstr("'planted'"));
  EXPECT_THAT(names_in(directory.path()), IsEmpty());
  storage->before_each_call(nullptr);
  commit(checkpointer, 1);
  EXPECT_THAT(names_in(directory / "step-00000001"),
              ::testing::Not(::testing::Contains("planted")));
}

TEST(Leftovers, AreSweptByTheFirstSaveAndByNothingElse) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1});
  const std::vector<std::string> leftovers{".step-00000002.partial-0123456789abcdef",
                                           ".step-00000001.replaced-0123456789abcdef",
                                           ".step-00000009.deleting"};
  for (const std::string& name : leftovers) {
    std::filesystem::create_directory(directory / name);
    write_text(directory / name / "file", "x");
  }
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  EXPECT_EQ(restore_newest(checkpointer), 1);
  EXPECT_EQ(names_in(directory.path()).size(), leftovers.size() + 1);
  commit(checkpointer, 3);
  EXPECT_THAT(names_in(directory.path()), ElementsAre("step-00000001", "step-00000003"));
}

TEST(Leftovers, ALivingWritersPartialDirectoryIsNotSwept) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1});
  const auto other = must(open_posix_storage(directory.path()));
  const std::string name = ".step-00000002.partial-0123456789abcdef";
  auto partial = must(other->begin(name));
  commit_steps(directory.path(), {3});
  EXPECT_TRUE(std::filesystem::exists(directory / name));
  partial.reset();
  EXPECT_FALSE(std::filesystem::exists(directory / name));
}

TEST(Leftovers, AStepMovedAsideIsReadAndKeptUntilItsPlaceIsTaken) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2});
  // A writer without RENAME_EXCHANGE died between its two renames.
  std::filesystem::rename(directory / "step-00000002",
                          directory / ".step-00000002.replaced-0123456789abcdef");
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  EXPECT_EQ(restore_newest(checkpointer), 2);
  commit(checkpointer, 3);
  EXPECT_THAT(must(checkpointer.steps()), ElementsAre(1, 2, 3));
  Job job(2);
  EXPECT_EQ(must_fail(checkpointer.save(2, job.state())).code, ErrorCode::kAlreadyExists);
  commit(checkpointer, 2, overwrite());
  EXPECT_THAT(must(checkpointer.steps()), ElementsAre(1, 3, 2));
  must(checkpointer.close());
  commit_steps(directory.path(), {4});
  EXPECT_THAT(names_in(directory.path()),
              ElementsAre("step-00000001", "step-00000002", "step-00000003", "step-00000004"));
}

TEST(Replacing, FilesThatSomebodyPutBesideAStepGoWithItAndAreNamed) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  commit(checkpointer, 1);
  write_text(directory / "step-00000001/tokenizer.json", "mine");
  const Save save = commit(checkpointer, 1, overwrite());
  EXPECT_THAT(save.warnings(), ElementsAre(HasSubstr("tokenizer.json")));
  EXPECT_THAT(commit(checkpointer, 1, overwrite()).warnings(), IsEmpty());
}

TEST(OneWriter, ASecondOneMayReadButItsSaveNamesTheFirst) {
  const TemporaryDirectory directory;
  CheckpointerOptions options;
  options.opened_at = "train.py:42";
  Checkpointer first = must(Checkpointer::open(directory.path(), options));
  Checkpointer second = must(Checkpointer::open(directory.path()));
  commit(first, 1);
  EXPECT_EQ(restore_newest(second), 1);
  EXPECT_EQ(must(second.latest_step()), 1);
  Job job(2);
  const Error error = must_fail(second.save(2, job.state()));
  EXPECT_EQ(error.code, ErrorCode::kUnavailable);
  char host[256] = {};
  ASSERT_EQ(::gethostname(host, sizeof(host) - 1), 0);
  EXPECT_THAT(error.message, HasSubstr(host));
  EXPECT_THAT(error.message, HasSubstr(std::to_string(::getpid())));
  EXPECT_THAT(error.message, HasSubstr("train.py:42"));
  must(first.close());
  commit(second, 2);
  EXPECT_THAT(must(second.steps()), ElementsAre(1, 2));
}

TEST(OneWriter, WhoeverRemovesTheWholeDirectoryDoesNotLetASecondWriterIn) {
  const TemporaryDirectory directory;
  Checkpointer first = must(Checkpointer::open(directory / "run"));
  commit(first, 1);
  std::filesystem::remove_all(directory / "run");
  Checkpointer second = must(Checkpointer::open(directory / "run"));
  commit(second, 7);
  Job job(2);
  EXPECT_EQ(must_fail(first.save(2, job.state())).code, ErrorCode::kUnavailable);
  must(second.close());
  commit(first, 2);
  EXPECT_THAT(must(first.steps()), ElementsAre(7, 2)) << "in the order of their commits";
}

// Runs in a child without any rights, and gives what it returned.
int run_unprivileged(const std::function<int()>& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    constexpr id_t kNobody = 65534;
    const bool dropped = ::geteuid() != 0 || (::setgroups(0, nullptr) == 0 &&
                                              ::setgid(kNobody) == 0 && ::setuid(kNobody) == 0);
    int result = 98;
    try {
      if (dropped) result = body();
    } catch (const std::exception&) {
    }
    ::_exit(result);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 97;
}

TEST(OneWriter, ADirectoryThatIsNotWritableIsNamedWithTheErrno) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1});
  const auto locked = directory / "locked";
  std::filesystem::create_directory(locked);
  ASSERT_EQ(::chmod(directory.path().c_str(), 0555), 0);
  const int result = run_unprivileged([&] {
    for (const auto& path : {directory.path(), locked / "below"}) {
      Checkpointer checkpointer = must(Checkpointer::open(path));
      Job job(2);
      const Result<Save> save = checkpointer.save(2, job.state());
      if (save) return 1;
      if (save.error().code != ErrorCode::kIo) return 2;
      if (save.error().system_errno != EACCES) return 3;
      if (save.error().text().find(path.string()) == std::string::npos) return 4;
    }
    // Reading still works.
    Checkpointer reader = must(Checkpointer::open(directory.path()));
    return restore_newest(reader) == 1 ? 0 : 5;
  });
  EXPECT_EQ(result, 0);
  EXPECT_EQ(::chmod(directory.path().c_str(), 0755), 0);
}

// What a forked child does with a Checkpointer of its own.
Result<Outcome> save_in_child(const std::filesystem::path& directory, Job& job) {
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer permits no new threads after a fork.
  checkpoint::Environment parts;
  parts.clock = std::make_shared<base::SystemClock>();
  parts.devices = std::make_shared<device::Registry>();
  const auto pipeline = std::make_shared<testing::ManualExecutor>();
  parts.pipeline = pipeline;
  auto storage = must(open_posix_storage(directory));
  Checkpointer checkpointer = must(CheckpointerAccess::open(storage, {}, std::move(parts)));
  const Result<Save> save = checkpointer.save(7, job.state());
  if (!save) return failure(save.error());
  pipeline->run_all();
  return save->wait_durable(kPatience);
#else
  Checkpointer checkpointer = must(Checkpointer::open(directory));
  return save_durably(checkpointer, 7, job);
#endif
}

TEST(Fork, TheChildsCopyIsDeadAndTheParentsGoesOn) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  const Save first = commit(checkpointer, 1);
  Job job(2);
  const pid_t child = ::fork();
  if (child == 0) {
    int result = 0;
    {
      Checkpointer dead = std::move(checkpointer);
      StateDict state = job.state();
      const auto unavailable = [&](const auto& answer) {
        if (answer || answer.error().code != ErrorCode::kUnavailable) result = 1;
      };
      unavailable(dead.save(2, state));
      unavailable(dead.restore(state));
      unavailable(dead.wait_until_finished(kPatience));
      unavailable(dead.latest_step());
      unavailable(dead.steps());
      unavailable(dead.close());
      unavailable(first.wait_staged(kPatience));
      unavailable(first.wait_durable(kPatience));
      if (first.outcome() || first.summary().find("forked") == std::string::npos) result = 3;
      // On the same directory the child is a second writer, on another one it is free.
      unavailable(save_in_child(directory.path(), job));
      const auto saved = save_in_child(directory / "child", job);
      if (!saved || saved->kind != Outcome::Kind::kCommitted) result = 2;
    }
    ::_exit(result);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  // The lock is still the parent's, and so is everything else.
  Checkpointer second = must(Checkpointer::open(directory.path()));
  EXPECT_EQ(must_fail(second.save(5, job.state())).code, ErrorCode::kUnavailable);
  commit(checkpointer, 2);
  EXPECT_THAT(must(checkpointer.steps()), ElementsAre(1, 2));
  EXPECT_EQ(content_of(must(load(directory / "child")).state), content_of(job));
  must(checkpointer.close());
}

TEST(Fork, AChildThatLivesOnDoesNotKeepTheLock) {
  const TemporaryDirectory directory;
  int pipe_ends[2];
  ASSERT_EQ(::pipe(pipe_ends), 0);
  pid_t child = 0;
  {
    Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
    commit(checkpointer, 1);
    child = ::fork();
    if (child == 0) {
      ::close(pipe_ends[1]);
      char byte = 0;
      ::_exit(::read(pipe_ends[0], &byte, 1) == 0 ? 0 : 1);  // Until the parent closes its end.
    }
    must(checkpointer.close());
  }
  commit_steps(directory.path(), {2});
  ::close(pipe_ends[1]);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  ::close(pipe_ends[0]);
}

}  // namespace
}  // namespace strandline
