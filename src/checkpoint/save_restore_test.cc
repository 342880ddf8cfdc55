// What goes in comes out: every kind of tensor, key and plain value, as it was at the call.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "strandline/checkpointer.h"
#include "testing/checkpoint_fixture.h"

namespace strandline {
namespace {

using testing::bytes_of;
using testing::content_of;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Job;
using testing::kPatience;
using testing::must;
using testing::must_fail;
using testing::TemporaryDirectory;

// Loads the newest step of a directory and describes it.
std::vector<std::string> loaded_content(const std::filesystem::path& directory) {
  return content_of(must(load(directory)).state);
}

void save_and_close(const std::filesystem::path& directory, const StateDict& state,
                    const SaveOptions& options = {}) {
  Checkpointer checkpointer = must(Checkpointer::open(directory));
  must(must(checkpointer.save(1, state, options)).wait_durable(kPatience));
  must(checkpointer.close());
}

TEST(SaveAndRestore, AnotherJobBecomesTheSavedOne) {
  const TemporaryDirectory directory;
  testing::commit_steps(directory / "run", {7});
  Checkpointer checkpointer = must(Checkpointer::open(directory / "run"));
  Job job(3);
  StateDict state = job.state();
  const auto restored = must(checkpointer.restore(state));
  ASSERT_TRUE(restored);
  EXPECT_EQ(restored->step, 7);
  Job expected(7);
  EXPECT_EQ(content_of(state), content_of(expected));
  EXPECT_EQ(job.weights, expected.weights);
  EXPECT_EQ(job.moments, expected.moments);
  EXPECT_EQ(job.rng, expected.rng);
  EXPECT_TRUE(restored->warnings.empty());
  // Each restored tensor is the destination's own.
  for (std::size_t i = 0; i < restored->destination.size(); ++i) {
    ASSERT_TRUE(restored->destination[i]);
    EXPECT_EQ(restored->state.tensors()[i].data, state.tensors()[*restored->destination[i]].data);
  }
}

TEST(SaveAndRestore, WhatIsMutatedAfterTheCallIsNotInTheCheckpoint) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  Job job(1);
  const std::vector<std::string> at_the_call = content_of(job);
  const Save save = must(checkpointer.save(1, job.state()));
  std::fill(job.weights.begin(), job.weights.end(), -1.0f);
  std::fill(job.moments.begin(), job.moments.end(), -1.0);
  job.rng = std::vector<std::uint8_t>();  // Freed.
  must(save.wait_durable(kPatience));
  EXPECT_EQ(loaded_content(directory.path()), at_the_call);
}

TEST(SaveAndRestore, EveryElementTypeComesBackBitForBit) {
  const TemporaryDirectory directory;
  std::vector<std::vector<std::uint8_t>> memory;
  StateDictBuilder builder;
  for (std::uint8_t i = 0; i < kDTypeCount; ++i) {
    const auto dtype = static_cast<DType>(i);
    std::vector<std::uint8_t>& bytes = memory.emplace_back(8 * dtype_bits(dtype) / 8);
    for (std::size_t j = 0; j < bytes.size(); ++j) {
      bytes[j] = static_cast<std::uint8_t>(dtype == DType::kBool ? j % 2 : j * 37 + i);
    }
    must(builder.tensor(dtype_name(dtype), TensorView::row_major(bytes.data(), dtype, {2, 4})));
  }
  const StateDict state = must(builder.finish());
  save_and_close(directory.path(), state);
  EXPECT_EQ(loaded_content(directory.path()), content_of(state));
}

TEST(SaveAndRestore, StridedExpandedReversedScalarAndEmptyTensorsComeBackRowMajor) {
  const TemporaryDirectory directory;
  std::vector<std::int32_t> numbers(24);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<std::int32_t>(i);
  const TensorView all = TensorView::of(numbers, {4, 6});
  TensorView columns = all;  // Every second column, transposed.
  columns.shape = {3, 4};
  columns.strides_bytes = {8, 24};
  TensorView expanded = all;
  expanded.shape = {5, 6};
  expanded.strides_bytes = {0, 4};
  TensorView reversed = all;
  reversed.data = all.data + 23 * 4;
  reversed.shape = {24};
  reversed.strides_bytes = {-4};
  TensorView scalar = all;
  scalar.data = all.data + 5 * 4;
  scalar.shape = {};
  scalar.strides_bytes = {};
  TensorView empty = all;
  empty.shape = {0, 3};
  empty.strides_bytes = {12, 4};
  const StateDict state{{"all", all},           {"columns", columns}, {"expanded", expanded},
                        {"reversed", reversed}, {"scalar", scalar},   {"empty", empty}};
  save_and_close(directory.path(), state);
  const Loaded loaded = must(load(directory.path()));
  EXPECT_EQ(content_of(loaded.state), content_of(state));
  // Expanded elements are stored in full; the scalar lies inside `all` and is stored there.
  EXPECT_EQ(must(loaded.state.tensor("expanded")).byte_count(), 5u * 6 * 4);
  EXPECT_EQ(must(loaded.state.tensor("scalar")).data, must(loaded.state.tensor("all")).data + 20);

  // And into strided destinations.
  std::vector<std::int32_t> other(24, -1);
  TensorView destination = TensorView::of(other, {4, 6});
  destination.shape = {3, 4};
  destination.strides_bytes = {8, 24};
  StateDict wanted{{"columns", destination}};
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  RestoreOptions options;
  options.strict = false;
  ASSERT_TRUE(must(checkpointer.restore(wanted, options)));
  for (std::size_t i = 0; i < other.size(); ++i) {
    EXPECT_EQ(other[i], i % 2 == 0 ? numbers[i] : -1) << i;
  }
}

TEST(SaveAndRestore, NestedContainersOfEveryKindAndKeysOfEveryTypeComeBack) {
  const TemporaryDirectory directory;
  std::vector<float> memory{1, 2, 3};
  const TensorView view = TensorView::of(memory);
  StateDictBuilder builder(NodeKind::kOrderedDict);
  must(builder.begin("dict", NodeKind::kDict));
  for (const Key& key : {Key(Value::None{}), Key(true), Key(1), Key("1"), Key(1.5),
                         Key(Value::Bytes{std::string("\0\xff", 2)}), Key("a.b"), Key(""),
                         Key(Value::BigInteger{"123456789012345678901234567890"})}) {
    must(builder.tensor(key, view));
  }
  must(builder.end());
  must(builder.begin("list", NodeKind::kList));
  must(builder.begin(0, NodeKind::kTuple));
  must(builder.value(0, "x"));
  must(builder.tensor(1, view));
  must(builder.end());
  must(builder.begin(1, NodeKind::kList));
  must(builder.end());
  must(builder.end());
  must(builder.begin("counter", NodeKind::kCounter));
  must(builder.value("red", 2));
  must(builder.end());
  must(builder.begin("empty", NodeKind::kDict));
  must(builder.end());
  must(builder.begin_metadata(NodeKind::kDict));
  must(builder.value("version", 1));
  must(builder.end());
  const StateDict state = must(builder.finish());
  save_and_close(directory.path(), state);
  EXPECT_EQ(loaded_content(directory.path()), content_of(state));
}

TEST(SaveAndRestore, PlainValuesComeBackToTheLastBit) {
  const TemporaryDirectory directory;
  const double strange_nan = std::bit_cast<double>(0x7ff8dead0000beefull);
  const Value::List values{Value::None{},
                           true,
                           false,
                           0,
                           -1,
                           std::numeric_limits<std::int64_t>::min(),
                           Value::BigInteger{"-340282366920938463463374607431768211456"},
                           0.0,
                           -0.0,
                           strange_nan,
                           std::numeric_limits<double>::infinity(),
                           -std::numeric_limits<double>::infinity(),
                           5e-324,
                           0.1,
                           "",
                           "text \"with\" \n and \u00e9",
                           Value::Bytes{std::string("\0\x80\xff", 3)},
                           Value::List{1, Value::List{}, "x"},
                           Value::Tagged{"torch.dtype", {"float32"}}};
  StateDictBuilder builder;
  for (std::size_t i = 0; i < values.size(); ++i) must(builder.value(i, values[i]));
  const StateDict state = must(builder.finish());
  save_and_close(directory.path(), state);
  const Loaded loaded = must(load(directory.path()));
  ASSERT_EQ(loaded.state.values().size(), values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    EXPECT_TRUE(loaded.state.values()[i].identical(values[i])) << values[i].text();
  }
}

TEST(SaveAndRestore, AStateWithoutTensorsAndAnEmptyStateAreCheckpointsToo) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  must(must(checkpointer.save(1, StateDict())).wait_durable(kPatience));
  EXPECT_EQ(loaded_content(directory.path()), content_of(StateDict()));
  const StateDict values{{"epoch", 3}};
  must(must(checkpointer.save(2, values)).wait_durable(kPatience));
  EXPECT_EQ(loaded_content(directory.path()), content_of(values));
}

TEST(SaveAndRestore, MetricsMetadataAndExtraFilesAreKept) {
  const TemporaryDirectory directory;
  Job job(1);
  SaveOptions options;
  options.metrics = {{"accuracy", 0.75}, {"loss", 0.31}};
  options.metadata = StateDict{{"git", "abc"}, {"tags", Value::List{"a", 2}}};
  options.extra_files = {{"config.json", "{\"hidden\": 64}\n"}};
  save_and_close(directory.path(), job.state(), options);
  const Checkpoint checkpoint = must(Checkpoint::open(directory / "step-00000001"));
  EXPECT_EQ(checkpoint.info().metrics, options.metrics);
  EXPECT_EQ(content_of(checkpoint.info().metadata), content_of(options.metadata));
  EXPECT_EQ(testing::read_text(directory / "step-00000001/config.json"), "{\"hidden\": 64}\n");
  EXPECT_TRUE(must(checkpoint.verify()).empty());
  EXPECT_EQ(checkpoint.info().run.size(), 32u);
  std::uint64_t bytes = 0;
  for (const std::string& name : testing::names_in(directory / "step-00000001")) {
    bytes += std::filesystem::file_size(directory / "step-00000001" / name);
  }
  EXPECT_EQ(checkpoint.info().bytes, bytes);
}

TEST(SaveAndRestore, ProgressEndsAtItsTotalWithHeadersNotCounted) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  Job job(1);
  const Save save = must(checkpointer.save(1, job.state()));
  must(save.wait_staged(kPatience));
  EXPECT_EQ(save.progress().bytes_staged, save.progress().bytes_total);
  must(save.wait_durable(kPatience));
  const Progress progress = save.progress();
  // The tied head is stored once.
  EXPECT_EQ(progress.bytes_total, job.weights.size() * 4 + job.moments.size() * 8 + job.rng.size());
  EXPECT_EQ(progress.bytes_staged, progress.bytes_total);
  EXPECT_EQ(progress.bytes_written, progress.bytes_total);
  EXPECT_TRUE(progress.ended);
  EXPECT_EQ(save.step(), 1);
  EXPECT_TRUE(save.warnings().empty());
}

TEST(SaveAndRestore, TimingsAddUpAndTheSummaryIsOneLine) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  Job job(1);
  SaveOptions options;
  options.collect_time = std::chrono::milliseconds(6);
  const Save save = must(checkpointer.save(1200, job.state(), options));
  must(save.wait_durable(kPatience));
  const Timings timings = save.timings();
  EXPECT_EQ(timings.collect_ms, 6);
  EXPECT_GT(timings.copy_ms, 0);
  EXPECT_GT(timings.prepare_ms, 0);
  EXPECT_GE(timings.blocked_ms, timings.collect_ms + timings.prepare_ms + timings.plan_ms +
                                    timings.wait_ms + timings.copy_ms);
  EXPECT_GT(timings.write_ms, 0);
  EXPECT_GT(timings.commit_ms, 0);
  EXPECT_GE(timings.durable_ms, timings.collect_ms + timings.commit_ms);
  EXPECT_THAT(save.summary(), ::testing::StartsWith("step 1200: blocked "));
  EXPECT_THAT(save.summary(), HasSubstr("(collect 6, "));
  EXPECT_THAT(save.summary(), HasSubstr(", durable in "));
  EXPECT_THAT(save.summary(), ::testing::EndsWith(", mode copy"));
  EXPECT_THAT(save.summary(), ::testing::Not(HasSubstr("\n")));
}

TEST(SaveAndRestore, WithoutCheckpointsRestoreGivesNothingAndChangesNothing) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer = must(Checkpointer::open(directory / "not/there/yet"));
  Job job(1);
  StateDict state = job.state();
  EXPECT_FALSE(must(checkpointer.restore(state)));
  RestoreOptions options;
  options.step = 6;
  EXPECT_FALSE(must(checkpointer.restore(state, options)));
  EXPECT_EQ(content_of(state), content_of(Job(1).state()));
  EXPECT_FALSE(must(checkpointer.latest_step()));
  EXPECT_TRUE(must(checkpointer.steps()).empty());
  EXPECT_FALSE(std::filesystem::exists(directory / "not"));  // Opening creates nothing.
  // A save creates the directory and its parents.
  must(testing::save_durably(checkpointer, 5, job));
  EXPECT_EQ(must(checkpointer.latest_step()), 5);
  EXPECT_EQ(must_fail(checkpointer.restore(state, options)).code, ErrorCode::kNotFound);
}

TEST(SaveAndRestore, WrongArgumentsAreRefusedByNameAndTheEngineStaysUsable) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  Job job(1);
  EXPECT_EQ(must_fail(checkpointer.save(-1, job.state())).code, ErrorCode::kInvalidArgument);

  StateDict twice{{"a", 1}, {"a", 2}};
  EXPECT_THAT(must_fail(checkpointer.save(1, twice)).text(), HasSubstr("a"));

  std::vector<float> memory(4);
  TensorView freed = TensorView::of(memory);
  freed.storage_bytes = 8;
  const Error outside = must_fail(checkpointer.save(1, StateDict{{"freed", freed}}));
  EXPECT_EQ(outside.code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(outside.key_path, "freed");

  SaveOptions with_tensor;
  with_tensor.metadata = StateDict{{"a", TensorView::of(memory)}};
  EXPECT_THAT(must_fail(checkpointer.save(1, job.state(), with_tensor)).message,
              HasSubstr("metadata"));
  for (const char* name : {"../evil", ".hidden", "a/b", "", "manifest.json", "rank-00000.json",
                           "x.safetensors", "model.safetensors.index.json"}) {
    SaveOptions extra;
    extra.extra_files = {{name, "x"}};
    EXPECT_EQ(must_fail(checkpointer.save(1, job.state(), extra)).code, ErrorCode::kInvalidArgument)
        << name;
  }
  CheckpointerOptions options;
  options.keep = 0;
  EXPECT_EQ(must_fail(Checkpointer::open(directory.path(), options)).code,
            ErrorCode::kInvalidArgument);

  must(testing::save_durably(checkpointer, 1, job));
  EXPECT_THAT(testing::names_in(directory.path()), ElementsAre("step-00000001"));
  must(checkpointer.close());
}

TEST(SaveAndRestore, AfterCloseEverythingIsRefusedAndClosingAgainIsFine) {
  const TemporaryDirectory directory;
  Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
  Job job(1);
  must(testing::save_durably(checkpointer, 1, job));
  must(checkpointer.close());
  must(checkpointer.close());
  EXPECT_EQ(must_fail(checkpointer.save(2, job.state())).code, ErrorCode::kUnavailable);
  StateDict state = job.state();
  EXPECT_EQ(must_fail(checkpointer.restore(state)).code, ErrorCode::kUnavailable);
}

TEST(SaveAndRestore, AHandleOutlivesItsCheckpointer) {
  const TemporaryDirectory directory;
  std::optional<Save> save;
  {
    Checkpointer checkpointer = must(Checkpointer::open(directory.path()));
    Job job(1);
    save = must(checkpointer.save(1, job.state()));
  }
  EXPECT_EQ(must(save->wait_durable(kPatience)).kind, Outcome::Kind::kCommitted);
  EXPECT_TRUE(save->progress().ended);
}

}  // namespace
}  // namespace strandline
