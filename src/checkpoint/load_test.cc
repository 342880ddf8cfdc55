// load(), list_checkpoints() and save(path): checkpoints without a Checkpointer.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <numeric>

#include "strandline/checkpointer.h"
#include "testing/checkpoint_fixture.h"

namespace strandline {
namespace {

using ::testing::AllOf;
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
using testing::TemporaryDirectory;
using testing::write_text;

LoadOptions keys(std::vector<std::variant<std::string, KeyPath>> wanted) {
  LoadOptions options;
  options.keys = std::move(wanted);
  return options;
}

TEST(Load, GivesTheNewestOrTheStepAskedForOrAStepsDirectory) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {3, 1, 2});
  EXPECT_EQ(must(load(directory.path())).step, 2);
  LoadOptions options;
  options.step = 3;
  const Loaded third = must(load(directory.path(), options));
  EXPECT_EQ(third.step, 3);
  EXPECT_EQ(content_of(third.state), content_of(Job(3).state()));
  EXPECT_THAT(third.roots, ElementsAre(0));
  EXPECT_EQ(must(load(directory / "step-00000003")).step, 3);
  EXPECT_EQ(must(load(directory / "step-00000003/")).step, 3);
  EXPECT_EQ(must(load(directory / "step-00000003", options)).step, 3);
  options.step = 1;
  EXPECT_EQ(must_fail(load(directory / "step-00000003", options)).code,
            ErrorCode::kInvalidArgument);
  options.step = 7;
  EXPECT_EQ(must_fail(load(directory.path(), options)).code, ErrorCode::kNotFound);
  for (const auto& nowhere : {directory / "nowhere", directory / "step-00000004"}) {
    const Error error = must_fail(load(nowhere));
    EXPECT_EQ(error.code, ErrorCode::kNotFound);
    EXPECT_THAT(error.text(), HasSubstr(nowhere.string()));
  }
}

TEST(Load, AnExactKeyWinsOverADottedPath) {
  const TemporaryDirectory directory;
  StateDictBuilder builder;
  must(builder.begin("a", NodeKind::kDict));
  must(builder.value("b", "nested"));
  must(builder.value(7, "integer"));
  must(builder.end());
  must(builder.value("a.b", "exact"));
  must(save(directory / "x", must(builder.finish())));
  const Loaded loaded =
      must(load(directory / "x", keys({"a.b", KeyPath{"a", "b"}, "a.7", KeyPath{"a", 7}})));
  const auto value = [&](std::size_t i) {
    return loaded.state.values()[loaded.state.structure().nodes()[loaded.roots[i]].leaf].text();
  };
  ASSERT_EQ(loaded.roots.size(), 4u);
  EXPECT_EQ(value(0), "'exact'");
  EXPECT_EQ(value(1), "'nested'");
  EXPECT_EQ(value(2), "'integer'");
  EXPECT_EQ(value(3), "'integer'");
  EXPECT_EQ(must_fail(load(directory / "x", keys({KeyPath{"a", "7"}}))).code, ErrorCode::kNotFound);
}

TEST(Load, ASubtreeReadsOnlyItsOwnTensorsAndAliasesShareMemory) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1});
  std::string shard = read_text(directory / "step-00000001/state-00001-of-00001.safetensors");
  shard.back() = static_cast<char>(shard.back() ^ 1);  // Damaged, but not asked for.
  write_text(directory / "step-00000001/state-00001-of-00001.safetensors", shard);
  const Loaded loaded = must(load(directory.path(), keys({"model"})));
  const TensorView embedding = must(loaded.state.tensor("model.embedding"));
  EXPECT_EQ(embedding.data, must(loaded.state.tensor("model.head")).data);
  EXPECT_EQ(must(loaded.state.tensor("rng")).data, nullptr);
  EXPECT_EQ(testing::bytes_of(embedding), testing::bytes_of(Job(1).state().tensors()[0]));
  // An alias alone brings its own memory.
  const Loaded head = must(load(directory.path(), keys({"model.head"})));
  EXPECT_EQ(testing::bytes_of(must(head.state.tensor("model.head"))), testing::bytes_of(embedding));
  EXPECT_EQ(must(head.state.tensor("model.embedding")).data, nullptr);
}

TEST(Load, AliasesShareMemoryWithoutTheTensorThatTheyAreViewsOf) {
  std::vector<float> weights(64);
  std::iota(weights.begin(), weights.end(), 1.0F);
  TensorView half = TensorView::row_major(weights.data() + 3, DType::kF32, {32});
  half.storage_base = reinterpret_cast<const std::byte*>(weights.data());
  half.storage_bytes = weights.size() * sizeof(float);
  TensorView quarter = half;
  quarter.data += 5 * sizeof(float);
  quarter.shape = {16};
  TensorView other = half;
  other.dtype = DType::kF64;  // In the same bytes, but not where an element of it may begin.
  other.shape = {4};
  other.strides_bytes = {8};
  other.data += sizeof(float);
  const StateDict state{{"model", StateDict{{"flat", TensorView::of(weights)},
                                            {"quarter", quarter},
                                            {"half", half},
                                            {"other", other}}}};
  const TemporaryDirectory directory;
  must(save(directory / "x", state));
  const Loaded loaded =
      must(load(directory / "x", keys({"model.quarter", "model.half", "model.other"})));
  const TensorView loaded_half = must(loaded.state.tensor("model.half"));
  const TensorView loaded_quarter = must(loaded.state.tensor("model.quarter"));
  const TensorView loaded_other = must(loaded.state.tensor("model.other"));
  EXPECT_EQ(loaded_quarter.data, loaded_half.data + 5 * sizeof(float));
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(loaded_other.data) % sizeof(double), 0u);
  EXPECT_EQ(testing::bytes_of(loaded_half), testing::bytes_of(half));
  EXPECT_EQ(testing::bytes_of(loaded_quarter), testing::bytes_of(quarter));
  EXPECT_EQ(testing::bytes_of(loaded_other), testing::bytes_of(other));
}

TEST(Load, AMissingKeyIsReportedWithTheKnownOnes) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1});
  const Error error = must_fail(load(directory.path(), keys({"model", "modle"})));
  EXPECT_EQ(error.code, ErrorCode::kNotFound);
  EXPECT_EQ(error.key_path, "modle");
  EXPECT_THAT(error.message,
              AllOf(HasSubstr("'modle'"), HasSubstr("model, optimizer, rng, nothing, epoch")));
}

TEST(Load, PassesOverADamagedNewestStepAndWarns) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {1, 2});
  write_text(directory / "step-00000002/rank-00000.json", "x");
  const Loaded loaded = must(load(directory.path()));
  EXPECT_EQ(loaded.step, 1);
  EXPECT_THAT(loaded.warnings, ElementsAre(HasSubstr("step 2 was skipped")));
}

TEST(Load, LinksToAStepAndToADirectoryOfStepsAreFollowed) {
  const TemporaryDirectory directory;
  commit_steps(directory / "run", {1});
  std::filesystem::create_symlink(directory / "run", directory / "latest");
  std::filesystem::create_symlink(directory / "run/step-00000001", directory / "best");
  EXPECT_EQ(must(load(directory / "latest")).step, 1);
  EXPECT_EQ(must(load(directory / "best")).step, 1);
}

TEST(ListCheckpoints, GivesOldestCommitFirstAndUnreadableOnesBeforeAll) {
  const TemporaryDirectory directory;
  commit_steps(directory.path(), {3, 1, 2});
  write_text(directory / "step-00000003/manifest.json", "x");
  const std::vector<StepEntry> entries = must(list_checkpoints(directory.path()));
  ASSERT_EQ(entries.size(), 3u);
  EXPECT_EQ(entries[0].name, "step-00000003");
  ASSERT_TRUE(entries[0].error);
  EXPECT_EQ(entries[0].error->code, ErrorCode::kCorrupt);
  EXPECT_EQ(entries[1].step, 1);
  EXPECT_EQ(entries[2].step, 2);
  EXPECT_EQ(entries[2].info->sequence, 3u);
  EXPECT_EQ(must_fail(list_checkpoints(directory / "absent")).code, ErrorCode::kNotFound);
  std::filesystem::create_directory(directory / "empty");
  EXPECT_THAT(must(list_checkpoints(directory / "empty")), IsEmpty());
}

TEST(SaveOnce, WritesACheckpointAndReplacesIt) {
  const TemporaryDirectory directory;
  Job first(1);
  Job second(2);
  must(save(directory / "model.ckpt", first.state()));
  EXPECT_EQ(content_of(must(load(directory / "model.ckpt")).state), content_of(first));
  must(save(directory / "model.ckpt", second.state()));
  const Loaded loaded = must(load(directory / "model.ckpt"));
  EXPECT_EQ(content_of(loaded.state), content_of(second));
  EXPECT_EQ(loaded.step, 0);
  EXPECT_THAT(names_in(directory.path()), ElementsAre("model.ckpt"));
  EXPECT_THAT(must(must(Checkpoint::open(directory / "model.ckpt")).verify()), IsEmpty());
}

TEST(SaveOnce, TakesAnyPathThatNamesSomething) {
  const TemporaryDirectory directory;
  Job job(1);
  for (const auto& path :
       {directory / "with spaces", directory / "\u00fcml\u00e4ut \u2603", directory / "trailing/",
        directory / "new/parents/x", directory / "a/../b", directory / "line\nbreak",
        directory / "step-00000001", directory / "-rf", directory / "x.partial-1"}) {
    must(save(path, job.state()));
    must(save(path, job.state()));
    EXPECT_EQ(content_of(must(load(path)).state), content_of(job)) << path;
  }
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(directory.path());
  const Status relative = save("relative", job.state());
  const Result<Loaded> loaded = load("relative");
  const Result<Loaded> dotted = load("./relative/");
  std::filesystem::current_path(before);
  EXPECT_TRUE(relative);
  EXPECT_TRUE(loaded);
  EXPECT_TRUE(dotted);
  EXPECT_TRUE(std::filesystem::exists(directory / "relative/manifest.json"));
  for (const char* path : {"", ".", "..", "/", "x/..", "x/."}) {
    EXPECT_EQ(must_fail(save(path, job.state())).code, ErrorCode::kInvalidArgument) << path;
  }
}

TEST(SaveOnce, ReplacesWhatALinkLeadsToAndKeepsTheLink) {
  const TemporaryDirectory directory;
  Job first(1);
  must(save(directory / "far/real", first.state()));
  std::filesystem::create_symlink("far/real", directory / "link");
  for (const char* name : {"link", "link/"}) {
    Job next(name[4] == '/' ? 3 : 2);
    must(save(directory / name, next.state()));
    EXPECT_TRUE(std::filesystem::is_symlink(directory / "link"));
    EXPECT_EQ(content_of(must(load(directory / "far/real")).state), content_of(next));
    EXPECT_THAT(names_in(directory / "far"), ElementsAre("real"));
  }
}

TEST(SaveOnce, RefusesMoreMetadataThanAManifestHoldsBeforeItCopies) {
  const TemporaryDirectory directory;
  Job job(1);
  SaveOptions options;
  options.metadata = StateDict{{"log", Value(Value::Bytes{std::string(64 << 20, 'x')})}};
  const Error error = must_fail(save(directory / "x", job.state(), options));
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  EXPECT_EQ(error.key_path, "log");
  EXPECT_THAT(names_in(directory.path()), IsEmpty());
}

TEST(SaveOnce, RefusesWhateverIsNoIntactCheckpointAndLeavesItAlone) {
  const TemporaryDirectory directory;
  Job job(1);
  write_text(directory / "file", "mine");
  std::filesystem::create_directories(directory / "stuff/below");
  write_text(directory / "stuff/notes.txt", "mine");
  std::filesystem::create_directory(directory / "empty");
  commit_steps(directory / "run", {1});
  must(save(directory / "corrupt", job.state()));
  write_text(directory / "corrupt/manifest.json", "x");
  std::filesystem::create_symlink("nowhere", directory / "dangling");
  must(save(directory / "model", job.state()));
  write_text(directory / "model/tokenizer.json", "mine");
  for (const char* name : {"file", "stuff", "empty", "run", "corrupt", "dangling", "model"}) {
    const Error error = must_fail(save(directory / name, job.state()));
    EXPECT_EQ(error.code, ErrorCode::kAlreadyExists) << name;
    EXPECT_EQ(error.path, (directory / name).string());
  }
  EXPECT_THAT(must_fail(save(directory / "model", job.state())).message,
              HasSubstr("tokenizer.json"));
  EXPECT_EQ(read_text(directory / "model/tokenizer.json"), "mine");
  EXPECT_EQ(read_text(directory / "file"), "mine");
  EXPECT_EQ(read_text(directory / "stuff/notes.txt"), "mine");
  EXPECT_EQ(must(load(directory / "run")).step, 1);
  EXPECT_FALSE(save(directory / "file/below", job.state()));
  EXPECT_EQ(
      must_fail(save(directory / "negative", StateDict{{"a", TensorView::of(job.rng)}, {"a", 1}}))
          .code,
      ErrorCode::kInvalidArgument);
}

TEST(SaveOnce, SweepsWhatDeadCallsOnTheSamePathLeft) {
  const TemporaryDirectory directory;
  Job job(1);
  const auto dead = directory / ".x.partial-0123456789abcdef0123456789abcdef";
  const auto other = directory / ".y.partial-0123456789abcdef0123456789abcdef";
  for (const auto& partial : {dead, other}) {
    std::filesystem::create_directory(partial);
    write_text(partial / "planted", "evil");
  }
  const auto storage = must(open_posix_storage(directory.path()));
  const auto living = must(storage->begin(".x.partial-00000000000000000000000000000000"));
  must(save(directory / "x", job.state()));
  EXPECT_FALSE(std::filesystem::exists(dead));
  EXPECT_TRUE(std::filesystem::exists(other));  // Another path's.
  EXPECT_TRUE(std::filesystem::exists(directory / ".x.partial-00000000000000000000000000000000"));
  EXPECT_THAT(names_in(directory / "x"), ::testing::Not(::testing::Contains("planted")));
}

TEST(SaveOnce, ACheckpointThatWasMovedAsideIsStillReadAndThenReplaced) {
  const TemporaryDirectory directory;
  Job first(1);
  Job second(2);
  must(save(directory / "x", first.state()));
  // A writer without RENAME_EXCHANGE died between its two renames.
  std::filesystem::rename(directory / "x",
                          directory / ".x.replaced-0123456789abcdef0123456789abcdef");
  EXPECT_EQ(content_of(must(load(directory / "x")).state), content_of(first));
  must(save(directory / "x", second.state()));
  EXPECT_EQ(content_of(must(load(directory / "x")).state), content_of(second));
  EXPECT_THAT(names_in(directory.path()), ElementsAre("x"));
}

TEST(Load, ACheckpointThatIsReplacedWhileItIsReadIsReadInFull) {
  const TemporaryDirectory directory;
  Job first(1);
  Job second(2);
  must(save(directory / "x", first.state()));
  LoadOptions options;
  int calls = 0;
  options.allocate = [&](const Structure& structure, std::uint32_t tensor) -> Result<TensorView> {
    if (calls++ == 0) must(save(directory / "x", second.state()));
    const Structure::Tensor& saved = structure.tensors()[tensor];
    auto memory = std::make_shared<std::vector<std::byte>>(saved.byte_count() + 1);
    TensorView view = TensorView::row_major(memory->data(), saved.dtype, saved.shape);
    view.keep_alive = memory;
    return view;
  };
  const auto content = content_of(must(load(directory / "x", options)).state);
  EXPECT_TRUE(content == content_of(first) || content == content_of(second));
}

}  // namespace
}  // namespace strandline
