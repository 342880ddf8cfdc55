// Restoring in place: what is refused before anything changes, what is passed over, what is left.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cerrno>

#include "strandline/checkpointer.h"
#include "testing/checkpoint_fixture.h"

namespace strandline {
namespace {

using ::testing::AllOf;
using testing::commit_steps;
using testing::content_of;
using ::testing::ElementsAre;
using testing::FaultInjectingStorage;
using ::testing::HasSubstr;
using testing::Job;
using testing::kPatience;
using testing::must;
using testing::must_fail;
using ::testing::Not;
using testing::read_text;
using testing::TemporaryDirectory;
using testing::write_text;

constexpr const char* kModelShard = "model-00001-of-00001.safetensors";
constexpr const char* kStateShard = "state-00001-of-00001.safetensors";

void flip_last_byte(const std::filesystem::path& path) {
  std::string text = read_text(path);
  text.back() = static_cast<char>(text.back() ^ 1);
  write_text(path, text);
}

void save_state(const std::filesystem::path& directory, std::int64_t step, const StateDict& state) {
  Checkpointer checkpointer = must(Checkpointer::open(directory));
  must(must(checkpointer.save(step, state)).wait_durable(kPatience));
  must(checkpointer.close());
}

RestoreOptions not_strict() {
  RestoreOptions options;
  options.strict = false;
  return options;
}

class Restore : public ::testing::Test {
 protected:
  Checkpointer open() { return must(Checkpointer::open(directory_.path())); }

  // Expects an error, and that `state` keeps its content.
  Error refused(StateDict& state, const RestoreOptions& options = {}) {
    const auto before = content_of(state);
    Checkpointer checkpointer = open();
    const Error error = must_fail(checkpointer.restore(state, options));
    EXPECT_EQ(content_of(state), before);
    return error;
  }

  const TemporaryDirectory directory_;
};

TEST_F(Restore, AllNamesAndShapesInTheWayAreListedAndNothingIsChanged) {
  std::vector<float> a(4, 1), b(4, 2), c(4, 3), d(4, 4);
  save_state(directory_.path(), 1,
             StateDict{{"model", StateDict{{"a", TensorView::of(a)},
                                           {"b", TensorView::of(b)},
                                           {"only_saved", TensorView::of(c)},
                                           {"also_saved", 3}}},
                       {"x", StateDict{{"y", 1}}}});
  std::vector<double> wide(4);
  StateDict state{{"model", StateDict{{"a", TensorView::of(a, {2, 2})},
                                      {"b", TensorView::of(wide)},
                                      {"only_here", TensorView::of(d)}}},
                  {"x", 5},
                  {"only_value", 1}};
  const Error error = refused(state);
  EXPECT_EQ(error.code, ErrorCode::kMismatch);
  EXPECT_THAT(error.message,
              AllOf(HasSubstr("model.a: saved as F32 [4], here F32 [2, 2]"),
                    HasSubstr("model.b: saved as F32 [4], here F64 [4]"), HasSubstr("x: saved as"),
                    HasSubstr("missing from the checkpoint (2): model.only_here, only_value")));
  EXPECT_THAT(error.message, AllOf(HasSubstr("(2): model.only_saved, model.also_saved"),
                                   HasSubstr("nothing was changed"), HasSubstr("strict")));
  // Without strict the shapes still are in the way.
  const Error shapes = refused(state, not_strict());
  EXPECT_EQ(shapes.code, ErrorCode::kMismatch);
  EXPECT_THAT(shapes.message, Not(HasSubstr("only_here")));
}

TEST_F(Restore, WithoutStrictNamesOnOneSideAreLeftAloneAndReported) {
  std::vector<float> a(4, 1), b(4, 2), c(4, 3);
  save_state(directory_.path(), 1,
             StateDict{{"a", TensorView::of(a)}, {"b", TensorView::of(b)}, {"lr", 0.5}});
  std::vector<float> into(4, -1);
  StateDict state{{"a", TensorView::of(into)}, {"c", TensorView::of(c)}, {"decay", 0.1}};
  Checkpointer checkpointer = open();
  const Restored restored = *must(checkpointer.restore(state, not_strict()));
  EXPECT_EQ(into, a);
  EXPECT_EQ(c, std::vector<float>(4, 3));
  EXPECT_THAT(restored.missing, ElementsAre("c", "decay"));
  EXPECT_THAT(restored.unexpected, ElementsAre("b", "lr"));
  // What is unexpected is not even read.
  EXPECT_EQ(must(restored.state.tensor("b")).data, nullptr);
}

TEST_F(Restore, EmptyContainersListsAndNoneAreLeftToTheCaller) {
  std::vector<float> a(4, 1), b(4, 2);
  StateDictBuilder builder;
  must(builder.begin("state", NodeKind::kDict));
  must(builder.tensor(0, TensorView::of(a)));
  must(builder.end());
  must(builder.begin("list", NodeKind::kList));
  must(builder.tensor(0, TensorView::of(b)));
  must(builder.value(1, "x"));
  must(builder.end());
  must(builder.tensor("none", TensorView::of(a)));
  must(builder.value("value", 7));
  save_state(directory_.path(), 1, must(builder.finish()));

  std::vector<float> in_list(4, -1);
  StateDictBuilder here;
  must(here.begin("state", NodeKind::kDict));
  must(here.end());
  must(here.begin("list", NodeKind::kList));
  must(here.tensor(0, TensorView::of(in_list)));
  must(here.end());
  must(here.value("none", Value::None{}));
  must(here.value("value", Value::None{}));
  StateDict state = must(here.finish());
  Checkpointer checkpointer = open();
  const Restored restored = *must(checkpointer.restore(state));
  for (const char* name : {"state.0", "list.0", "none"}) {
    const TensorView view = must(restored.state.tensor(name));
    ASSERT_NE(view.data, nullptr) << name;
    EXPECT_EQ(testing::bytes_of(view),
              testing::bytes_of(TensorView::of(name == std::string("list.0") ? b : a)));
  }
  EXPECT_TRUE(must(restored.state.value("list.1")).identical("x"));
  EXPECT_TRUE(must(state.value("value")).identical(7));
  EXPECT_EQ(in_list, std::vector<float>(4, -1));
  for (const auto& destination : restored.destination) EXPECT_FALSE(destination);
}

TEST_F(Restore, ReadOnlyAndExpandedDestinationsAreRefusedByKey) {
  const std::vector<float> constant(4, 1);
  save_state(directory_.path(), 1, StateDict{{"m", StateDict{{"a", TensorView::of(constant)}}}});
  StateDict read_only{{"m", StateDict{{"a", TensorView::of(constant)}}}};
  const Error error = refused(read_only);
  EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(error.key_path, "m.a");
  EXPECT_THAT(error.message, HasSubstr("read-only"));

  std::vector<float> one(1);
  TensorView expanded = TensorView::of(one);
  expanded.shape = {4};
  expanded.strides_bytes = {0};
  StateDict state{{"m", StateDict{{"a", expanded}}}};
  const Error several = refused(state);
  EXPECT_EQ(several.code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(several.key_path, "m.a");
  EXPECT_THAT(several.message, HasSubstr("expanded"));

  std::vector<float> small(4);
  TensorView outside = TensorView::of(small);
  outside.storage_bytes = 8;
  StateDict freed{{"m", StateDict{{"a", outside}}}};
  EXPECT_EQ(must_fail(open().restore(freed)).code, ErrorCode::kInvalidArgument);
}

TEST_F(Restore, TwoDifferentSavedValuesForTheSameBytesAreAnErrorNamingBoth) {
  std::vector<float> a(8, 1), b(8, 2);
  save_state(directory_.path(), 1, StateDict{{"x", TensorView::of(a)}, {"y", TensorView::of(b)}});
  std::vector<float> tied(8, -1);
  StateDict same{{"x", TensorView::of(tied)}, {"y", TensorView::of(tied)}};
  const Error error = refused(same);
  EXPECT_EQ(error.code, ErrorCode::kMismatch);
  EXPECT_THAT(error.message, AllOf(HasSubstr("'x'"), HasSubstr("'y'"), HasSubstr("share memory")));

  // Overlapping by one element.
  std::vector<float> memory(15, -1);
  const std::span<float> low(memory.data(), 8);
  const std::span<float> high(memory.data() + 7, 8);
  StateDict partial{{"x", TensorView::of(low)}, {"y", TensorView::of(high)}};
  EXPECT_EQ(refused(partial).code, ErrorCode::kMismatch);
}

TEST_F(Restore, SharedDestinationsThatWereSavedAlikeAreAccepted) {
  std::vector<float> a(8);
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i);
  std::vector<float> equal = a;
  const std::span<float> tail(a.data() + 4, 4);
  // `tied` in another group with equal values, `tail` an overlap, odd and even interleaved.
  TensorView even = TensorView::of(a);
  even.shape = {4};
  even.strides_bytes = {8};
  TensorView odd = even;
  odd.data += 4;
  save_state(directory_.path(), 1,
             StateDict{{"m", StateDict{{"a", TensorView::of(a)}, {"even", even}, {"odd", odd}}},
                       {"tied", TensorView::of(equal)},
                       {"tail", TensorView::of(tail)}});
  std::vector<float> into(8, -1);
  const std::span<float> into_tail(into.data() + 4, 4);
  TensorView into_even = even;
  into_even.data = reinterpret_cast<std::byte*>(into.data());
  into_even.storage_base = into_even.data;
  TensorView into_odd = into_even;
  into_odd.data += 4;
  StateDict state{
      {"m", StateDict{{"a", TensorView::of(into)}, {"even", into_even}, {"odd", into_odd}}},
      {"tied", TensorView::of(into)},
      {"tail", TensorView::of(into_tail)}};
  ASSERT_TRUE(must(open().restore(state)));
  EXPECT_EQ(into, a);
}

TEST_F(Restore, AFlatBufferAndItsViewsAreReadOnceEach) {
  std::vector<float> flat(64);
  for (std::size_t i = 0; i < flat.size(); ++i) flat[i] = static_cast<float>(i);
  const auto state_of = [](std::vector<float>& all, std::span<float> low, std::span<float> high) {
    return StateDict{{"m", StateDict{{"high", TensorView::of(high, {4, 6})},
                                     {"flat", TensorView::of(all)},
                                     {"low", TensorView::of(low)}}}};
  };
  const std::span<float> all(flat);
  save_state(directory_.path(), 1, state_of(flat, all.subspan(0, 40), all.subspan(40, 24)));
  const auto reads = [this](StateDict state) {
    const auto storage = testing::faulty_storage(directory_.path());
    Checkpointer reader = must(Checkpointer::open(storage));
    EXPECT_TRUE(must(reader.restore(state)));
    std::size_t count = 0;
    for (const auto& call : storage->log()) count += call.operation == "read_at" ? 1 : 0;
    return count;
  };
  std::vector<float> apart(64), low(40), high(24);
  const std::size_t without_sharing = reads(state_of(apart, low, high));
  std::vector<float> into(64, -1);
  const std::span<float> views(into);
  EXPECT_EQ(reads(state_of(into, views.subspan(0, 40), views.subspan(40, 24))), without_sharing);
  EXPECT_EQ(into, flat);
  // The same views in other places are a conflict.
  StateDict moved = state_of(into, views.subspan(1, 40), views.subspan(40, 24));
  EXPECT_EQ(refused(moved).code, ErrorCode::kMismatch);
}

TEST_F(Restore, WhereSharedMemoryIsTooLargeToBeCheckedTheErrorSaysSo) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer ends the process where memory is refused";
#endif
  std::vector<float> a(2, 1), b(2, 1);
  save_state(directory_.path(), 1, StateDict{{"x", TensorView::of(a)}, {"y", TensorView::of(b)}});
  std::vector<float> memory(2, -1);
  // No machine has so much; nothing of it is touched.
  TensorView vast = TensorView::of(memory);
  vast.strides_bytes = {std::int64_t{1} << 61};
  vast.storage_bytes = (std::uint64_t{1} << 61) + sizeof(float);
  StateDict state{{"x", vast}, {"y", TensorView::of(memory)}};
  Checkpointer checkpointer = open();
  const Error error = must_fail(checkpointer.restore(state));
  EXPECT_EQ(error.code, ErrorCode::kMemoryLimit);
  EXPECT_THAT(error.message, AllOf(HasSubstr("share"), HasSubstr("free memory")));
}

TEST_F(Restore, OnDamageTheNextOlderStepIsTakenWithAWarning) {
  commit_steps(directory_.path(), {1, 2, 3});
  flip_last_byte(directory_ / "step-00000003" / kStateShard);
  write_text(directory_ / "step-00000002/manifest.json", "garbage");
  Job job(9);
  StateDict state = job.state();
  Checkpointer checkpointer = open();
  const Restored restored = *must(checkpointer.restore(state));
  EXPECT_EQ(restored.step, 1);
  EXPECT_EQ(content_of(state), content_of(Job(1).state()));
  EXPECT_THAT(restored.warnings,
              ElementsAre(AllOf(HasSubstr("step 3"), HasSubstr("rng")), HasSubstr("step 2")));
  // A step that was asked for by its number has no stand-in.
  RestoreOptions third;
  third.step = 3;
  const Error error = must_fail(checkpointer.restore(state, third));
  EXPECT_EQ(error.code, ErrorCode::kCorrupt);
  EXPECT_THAT(error.message, HasSubstr("overwritten already"));
}

TEST_F(Restore, WhenAllAreDamagedTheErrorNamesTheCausesAndWhatWasOverwritten) {
  commit_steps(directory_.path(), {1, 2});
  for (const char* step : {"step-00000001", "step-00000002"}) {
    flip_last_byte(directory_ / step / kStateShard);
  }
  Job job(9);
  StateDict state = job.state();
  const Error error = must_fail(open().restore(state));
  EXPECT_EQ(error.code, ErrorCode::kCorrupt);
  EXPECT_THAT(error.message, AllOf(HasSubstr("step 1"), HasSubstr("step 2"), HasSubstr("'rng'"),
                                   HasSubstr("overwritten already: model.embedding, model.head, "
                                             "optimizer.moments")));
  EXPECT_TRUE(must(state.value("epoch")).identical(9));  // Plain values go last.
}

TEST_F(Restore, OnlyTensorsThatWereTouchedAreNamedAsOverwritten) {
  std::vector<float> empty;
  std::vector<float> a(4, 1), b(4, 2);
  const auto state_of = [&] {
    return StateDict{
        {"empty", TensorView::of(empty)}, {"a", TensorView::of(a)}, {"b", TensorView::of(b)}};
  };
  save_state(directory_.path(), 1, state_of());
  flip_last_byte(directory_ / "step-00000001" / kStateShard);
  StateDict state = state_of();
  const Error error = must_fail(open().restore(state));
  EXPECT_THAT(error.message, HasSubstr("'b'"));
  EXPECT_THAT(error.message, ::testing::EndsWith("overwritten already: a"));
}

TEST_F(Restore, VerifyFirstChangesNothingWhenThereIsDamage) {
  commit_steps(directory_.path(), {1});
  flip_last_byte(directory_ / "step-00000001" / kStateShard);
  Job job(9);
  StateDict state = job.state();
  RestoreOptions options;
  options.verify_first = true;
  const Error error = refused(state, options);
  EXPECT_EQ(error.code, ErrorCode::kCorrupt);
  EXPECT_THAT(error.message, Not(HasSubstr("overwritten")));
  EXPECT_EQ(content_of(state), content_of(Job(9).state()));
}

TEST_F(Restore, VerifyFirstDoesNotFallBackWhereTheWayToTheDataIsAtFault) {
  commit_steps(directory_.path(), {1, 2});
  const auto storage = testing::faulty_storage(directory_.path());
  Checkpointer checkpointer = must(Checkpointer::open(storage));
  Job job(9);
  StateDict state = job.state();
  RestoreOptions options;
  options.verify_first = true;
  int system_errno = EMFILE;
  storage->before_each_call([&](const auto& call) {
    const bool data = call.name == "step-00000002/" + std::string(kStateShard);
    if (call.operation == "read_at" && data) storage->fail_call(call.number, system_errno);
  });
  EXPECT_EQ(must_fail(checkpointer.restore(state, options)).system_errno, EMFILE);
  system_errno = EIO;  // The medium itself.
  EXPECT_EQ(must(checkpointer.restore(state, options))->step, 1);
}

TEST_F(Restore, VerifyFirstDoesNotFallBackForAFileThatSomebodyAdded) {
  commit_steps(directory_.path(), {1, 2});
  write_text(directory_ / "step-00000002/notes.txt", "added later");
  Job job(9);
  StateDict state = job.state();
  RestoreOptions options;
  options.verify_first = true;
  EXPECT_EQ(must(open().restore(state, options))->step, 2);
}

TEST_F(Restore, WhenAnOlderStepDoesNotFitTheDamageOfTheNewerOneIsToldToo) {
  std::vector<float> a(4, 1);
  save_state(directory_.path(), 1, StateDict{{"something", TensorView::of(a)}});
  commit_steps(directory_.path(), {2});
  flip_last_byte(directory_ / "step-00000002" / kStateShard);
  Job job(9);
  StateDict state = job.state();
  const Error error = must_fail(open().restore(state));
  EXPECT_EQ(error.code, ErrorCode::kMismatch);
  EXPECT_THAT(error.message,
              AllOf(HasSubstr("something"), HasSubstr("step 2 was skipped"),
                    HasSubstr("overwritten already"), Not(HasSubstr("nothing was changed"))));
}

TEST_F(Restore, ProgressCountsToTheEndAndCanStopIt) {
  commit_steps(directory_.path(), {1});
  Job job(9);
  StateDict state = job.state();
  RestoreOptions options;
  std::uint64_t last = 0;
  std::uint64_t all = 0;
  options.progress = [&](std::uint64_t done, std::uint64_t total) {
    EXPECT_GE(done, last);
    last = done;
    all = total;
    return true;
  };
  ASSERT_TRUE(must(open().restore(state, options)));
  EXPECT_EQ(last, all);
  EXPECT_EQ(all, state.byte_count());
  options.progress = [](std::uint64_t, std::uint64_t) { return false; };
  EXPECT_EQ(must_fail(open().restore(state, options)).code, ErrorCode::kUnavailable);
}

TEST_F(Restore, TheCallersAllocatorGetsWhatHasNoDestination) {
  commit_steps(directory_.path(), {1});
  StateDict nothing;
  RestoreOptions options;
  std::vector<std::vector<std::byte>> memory;
  std::vector<std::string> names;
  options.allocate = [&](const Structure& structure, std::uint32_t tensor) -> Result<TensorView> {
    const Structure::Tensor& saved = structure.tensors()[tensor];
    names.push_back(structure.path_text(saved.node));
    return TensorView::row_major(memory.emplace_back(saved.byte_count() + 1).data(), saved.dtype,
                                 saved.shape);
  };
  const Restored restored = *must(open().restore(nothing, options));
  EXPECT_EQ(content_of(restored.state), content_of(Job(1).state()));
  EXPECT_THAT(names, ElementsAre("model.embedding", "optimizer.moments", "rng", "nothing"));
  options.allocate = [](const Structure&, std::uint32_t) -> Result<TensorView> {
    return failure(ErrorCode::kMemoryLimit, "no more");
  };
  EXPECT_EQ(must_fail(open().restore(nothing, options)).code, ErrorCode::kMemoryLimit);
}

// A reader whose calls another process interferes with.
class RestoreDuring : public Restore {
 protected:
  // Before the first call of `operation`, whatever `what` does happens.
  std::int64_t restore_while(const std::string& operation, const std::function<void()>& what) {
    const auto storage = testing::faulty_storage(directory_.path());
    bool happened = false;
    storage->before_each_call([&](const auto& call) {
      if (call.operation == operation && !std::exchange(happened, true)) what();
    });
    Checkpointer reader = must(Checkpointer::open(storage));
    Job job(9);
    StateDict state = job.state();
    const auto restored = must(reader.restore(state));
    EXPECT_TRUE(happened);
    if (!restored) return -1;
    EXPECT_EQ(content_of(state), content_of(Job(restored->step).state()));
    EXPECT_TRUE(restored->warnings.empty());
    return restored->step;
  }
};

TEST_F(RestoreDuring, AStepThatIsPrunedWhileItIsReadMeansStartingAgainFromTheNewest) {
  for (const char* operation : {"open", "file_bytes", "read_at"}) {
    commit_steps(directory_.path(), {1});
    EXPECT_EQ(restore_while(operation,
                            [&] {
                              CheckpointerOptions keep_one;
                              keep_one.keep = 1;
                              commit_steps(directory_.path(), {2}, keep_one);
                            }),
              2)
        << operation;
    std::filesystem::remove_all(directory_ / "step-00000002");
  }
}

TEST_F(RestoreDuring, AStepThatIsReplacedAtAnyCallIsReadInFullBeforeOrAfter) {
  // The k-th call, for every k.
  for (std::uint64_t k = 1;; ++k) {
    std::filesystem::remove_all(directory_ / "step-00000001");
    commit_steps(directory_.path(), {1});
    const auto storage = testing::faulty_storage(directory_.path());
    bool happened = false;
    storage->before_each_call([&](const auto& call) {
      if (call.number != k) return;
      happened = true;
      Checkpointer writer = must(Checkpointer::open(directory_.path()));
      Job job(2);
      SaveOptions options;
      options.overwrite = true;
      must(testing::save_durably(writer, 1, job, options));
    });
    Checkpointer reader = must(Checkpointer::open(storage));
    Job job(9);
    StateDict state = job.state();
    const auto restored = must(reader.restore(state));
    ASSERT_TRUE(restored) << k;
    const auto content = content_of(state);
    EXPECT_TRUE(content == content_of(Job(1).state()) || content == content_of(Job(2).state()))
        << k;
    EXPECT_TRUE(restored->warnings.empty()) << k << restored->warnings.front();
    if (!happened) {
      EXPECT_GT(k, 10u);
      break;
    }
  }
}

TEST_F(RestoreDuring, StepsThatKeepVanishingAreAnErrorNotALoop) {
  commit_steps(directory_.path(), {1});
  const auto storage = testing::faulty_storage(directory_.path());
  storage->before_each_call([&](const auto& call) {
    // Gone when its data are read, back when somebody lists.
    const auto step = directory_ / "step-00000001";
    const auto away = directory_ / "away";
    if (call.operation == "read_at" && call.name.ends_with(kModelShard) &&
        std::filesystem::exists(step)) {
      std::filesystem::rename(step, away);
      std::filesystem::remove_all(step);
      storage->fail_call(call.number, ENOENT);
    } else if (call.operation == "list" && std::filesystem::exists(away)) {
      std::filesystem::rename(away, step);
    }
  });
  Checkpointer reader = must(Checkpointer::open(storage));
  Job job(9);
  StateDict state = job.state();
  EXPECT_THAT(must_fail(reader.restore(state)).message, HasSubstr("vanishing"));
}

TEST_F(RestoreDuring, StepsThatVanishAtEveryListingAreNeverTakenForNoCheckpoint) {
  commit_steps(directory_.path(), {1});
  const auto storage = testing::faulty_storage(directory_.path());
  std::int64_t step = 1;
  // Whatever was listed is gone when it is opened, and the next one is there.
  storage->before_each_call([&](const auto& call) {
    if (call.operation != "open") return;
    const auto name = [](std::int64_t number) { return fmt::format("step-{:08}", number); };
    if (call.name != name(step)) return;
    std::filesystem::rename(directory_ / name(step), directory_ / name(step + 1));
    ++step;
  });
  Checkpointer reader = must(Checkpointer::open(storage));
  Job job(9);
  StateDict state = job.state();
  const auto restored = reader.restore(state);
  ASSERT_FALSE(restored) << (*restored ? "a step" : "no checkpoint at all");
  EXPECT_EQ(restored.error().code, ErrorCode::kIo);
  EXPECT_THAT(restored.error().message, HasSubstr("keep vanishing while they are read"));
  EXPECT_FALSE(reader.steps());
}

TEST_F(Restore, AStepThatCannotBeReadForWantOfRightsOrDescriptorsIsNotPassedOver) {
  commit_steps(directory_.path(), {1, 2});
  for (const int error : {EACCES, EMFILE, ENFILE, ENOMEM}) {
    for (const char* operation : {"open", "read_at"}) {
      const auto storage = testing::faulty_storage(directory_.path());
      storage->before_each_call([&](const auto& call) {
        if (call.operation == operation && call.name.starts_with("step-00000002")) {
          storage->fail_call(call.number, error);
        }
      });
      Checkpointer reader = must(Checkpointer::open(storage));
      Job job(9);
      StateDict state = job.state();
      const Error refusal = must_fail(reader.restore(state));
      EXPECT_EQ(refusal.code, ErrorCode::kIo) << operation << error;
      EXPECT_EQ(refusal.system_errno, error) << operation << refusal.text();
      EXPECT_THAT(refusal.message, HasSubstr("step-00000002"));
    }
  }
}

TEST_F(Restore, AStepThatTheDeviceCannotReadIsPassedOverWithAWarning) {
  commit_steps(directory_.path(), {1, 2});
  for (const int error : {EIO, EUCLEAN, EBADMSG, ESTALE}) {
    const auto storage = testing::faulty_storage(directory_.path());
    storage->before_each_call([&](const auto& call) {
      if (call.operation == "read_at" && call.name.starts_with("step-00000002")) {
        storage->fail_call(call.number, error);
      }
    });
    Checkpointer reader = must(Checkpointer::open(storage));
    Job job(9);
    StateDict state = job.state();
    const Restored restored = *must(reader.restore(state));
    EXPECT_EQ(restored.step, 1) << error;
    EXPECT_THAT(restored.warnings, ElementsAre(HasSubstr("step 2 was skipped")));
  }
}

TEST_F(Restore, WhereAStepIsNotThereTheErrorNamesThoseThatAre) {
  commit_steps(directory_.path(), {1, 7, 3});
  Job job(9);
  StateDict state = job.state();
  RestoreOptions ninth;
  ninth.step = 9;
  const Error error = refused(state, ninth);
  EXPECT_EQ(error.code, ErrorCode::kNotFound);
  EXPECT_THAT(error.message, AllOf(HasSubstr("no committed step 9"), HasSubstr("3, 7, 1")));
}

}  // namespace
}  // namespace strandline
