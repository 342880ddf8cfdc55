// The facade. From save() to the disk:
//
//   Checkpointer::save -> Snapshotter::take            on the caller's thread, which is blocked
//     -> [Pipeline] ShardWriter::run                   on the pipeline's thread
//     -> Committer::commit -> Storage::publish
//
// The pipeline gets the snapshot as soon as it is planned, so that writing begins while the rest is
// still being copied; a state larger than the memory ceiling depends on that.

#include "strandline/checkpointer.h"

#include <fmt/format.h>

#include <atomic>
#include <utility>

#include "base/fork.h"
#include "base/no_throw.h"
#include "base/result_macros.h"
#include "base/turn.h"
#include "base/wait.h"
#include "checkpoint/committer.h"
#include "checkpoint/environment.h"
#include "checkpoint/pipeline.h"
#include "checkpoint/restorer.h"
#include "checkpoint/save_record.h"
#include "checkpoint/state_check.h"
#include "staging/snapshotter.h"

namespace strandline::inline v0 {

namespace {

// The writer waits for each wave, whose staging ends by itself: at the latest when it has waited
// for memory and then for devices as long as it may, and copied. This is more than any copy takes,
// so that staging alone decides; without any bound a defect there would be a hang here.
constexpr std::chrono::hours kCopyWait(1);

// How long each wave of a save may wait for its devices, and for an earlier wave to be written. No
// wait for earlier saves does not mean none for this one's own: then it is the default of
// memory_wait.
std::chrono::milliseconds wave_wait(const CheckpointerOptions& options) {
  const bool at_once = options.memory_wait <= std::chrono::milliseconds(0);
  return base::at_most_a_year(at_once ? CheckpointerOptions{}.memory_wait : options.memory_wait);
}

}  // namespace

struct Checkpointer::Impl {
  Impl(std::shared_ptr<Storage> storage, CheckpointerOptions given, std::string run_id,
       checkpoint::Environment environment)
      : options(std::move(given)),
        run(std::move(run_id)),
        parts(std::move(environment)),
        store(std::move(storage)),
        snapshotter({.slab = {.host_bytes_max = options.host_bytes_max}}, *parts.devices,
                    parts.copy_workers.get(), *parts.clock),
        committer(store, options, run, *parts.clock),
        pipeline(committer, parts.pipeline, parts.clock, 2 * wave_wait(options) + kCopyWait) {}

  // Fails in a forked child and after close().
  [[nodiscard]] Status check_usable() const {
    if (base::fork_generation() != fork_generation) {
      return failure(ErrorCode::kUnavailable,
                     "this Checkpointer belongs to the process that forked; open one in the child");
    }
    if (closed.load())
      return failure(ErrorCode::kUnavailable, "the Checkpointer was closed; open a new one");
    return {};
  }

  // Fails in code that a save() of this thread runs while it waits: whoever waits for that save
  // there waits for ever.
  [[nodiscard]] Status check_outside_save() const {
    if (!turns.held_by_this_thread()) return {};
    return failure(ErrorCode::kUnavailable,
                   "a save() of this Checkpointer is waiting on this thread, and what it runs "
                   "meanwhile (such as the handler of a signal) called the Checkpointer: set a "
                   "flag there, and call it when save() has returned");
  }

  [[nodiscard]] Result<Save> save(std::int64_t step, const StateDict& state,
                                  const SaveOptions& save_options);
  struct Staging {
    bool submitted = false;      // The pipeline has the save, and ends its record.
    bool in_background = false;  // It failed there: the state was in order, and so is the caller.
  };
  [[nodiscard]] Status stage(const std::shared_ptr<Save::Record>& record, const StateDict& state,
                             const SaveOptions& save_options, Staging& staging);
  [[nodiscard]] Result<Save> end_unstaged(std::shared_ptr<Save::Record> record, Error error,
                                          const Staging& staging);
  [[nodiscard]] Status close();

  // Constant after construction.
  const CheckpointerOptions options;
  const std::string run;
  const checkpoint::Environment parts;
  const std::shared_ptr<Storage> store;
  const std::uint64_t fork_generation = base::fork_generation();

  staging::Snapshotter snapshotter;
  checkpoint::Committer committer;
  checkpoint::Pipeline pipeline;

  base::Turns turns;  // Of save() and close(): one at a time.
  std::atomic<bool> closed{false};
};

Status Checkpointer::Impl::stage(const std::shared_ptr<Save::Record>& record,
                                 const StateDict& state, const SaveOptions& save_options,
                                 Staging& staging) {
  const base::Clock::Instant begun = parts.clock->now();
  const bool patient = options.when_memory_is_full == MemoryPolicy::kWait;
  const auto deadline = base::deadline_after(begun, options.memory_wait);
  base::Wait wait(patient ? deadline : begun, save_options.interrupted);
  STRANDLINE_RETURN_IF_ERROR(pipeline.admit(wait));
  const double admitted_ms = base::milliseconds_between(begun, parts.clock->now());

  staging::TakeOptions take;
  take.deadline = deadline;
  take.wave_wait = wave_wait(options);
  take.wait_for_memory = patient;
  if (save_options.interrupted) {
    // Cancelled as well, so that a save which the pipeline has already is skipped, and not failed.
    take.interrupted = [&] { return save_options.interrupted() && record->cancel(); };
  }
  take.started = [&](std::shared_ptr<staging::Snapshot> snapshot) -> Status {
    record->attach(snapshot);
    if (snapshot->in_waves()) {
      record->warn(
          fmt::format("the state ({} bytes) is larger than host_bytes_max ({} bytes): it "
                      "was streamed in {} waves, which blocks longer",
                      snapshot->plan().file_bytes(), snapshotter.slab().host_bytes_max(),
                      snapshot->segments().size()));
    }
    SaveOptions kept = save_options;
    kept.interrupted = nullptr;  // It is the caller's, for the time of this call.
    pipeline.submit(
        {record, std::move(snapshot), checkpoint::without_memory(state), std::move(kept)});
    staging.submitted = true;
    return {};
  };
  staging::TakeTimings timings;
  const auto snapshot =
      base::no_throw("copying the state", [&] { return snapshotter.take(state, take, &timings); });
  record->change_timings([&](Timings& all) {
    all.plan_ms = timings.plan_ms;
    all.wait_ms = timings.wait_ms + admitted_ms;
    all.copy_ms = timings.copy_ms;
  });
  if (!staging.submitted) pipeline.dismiss();
  staging.in_background = staging.submitted && timings.failed_by_consumer;
  STRANDLINE_RETURN_IF_ERROR(snapshot);
  return {};
}

// What save() gives back when not everything was copied. What staging found is the caller's to
// correct, and raised. A disk that is full or slow is not: whether the background meets it while
// save() still copies or a moment later is chance, so it fails the save and not the call.
Result<Save> Checkpointer::Impl::end_unstaged(std::shared_ptr<Save::Record> record, Error error,
                                              const Staging& staging) {
  if (staging.in_background) return Save(std::move(record));  // The pipeline ends it.
  if (staging.submitted) record->set_raised();
  // The step may be saved again at once; what the pipeline still has of this save comes to nothing.
  if (record->take_reservation()) committer.release(record->step());
  // Before it was submitted, only earlier saves can have kept it waiting.
  if (staging.submitted || error.code != ErrorCode::kTimeout) return failure(std::move(error));
  if (options.when_memory_is_full == MemoryPolicy::kSkip) {
    record->end({Outcome::Kind::kSkipped, std::move(error)});
  } else {
    pipeline.end_failed(record, std::move(error));
  }
  return Save(std::move(record));
}

Result<Save> Checkpointer::Impl::save(std::int64_t step, const StateDict& state,
                                      const SaveOptions& save_options) {
  auto record = std::make_shared<Save::Record>(step, parts.clock);
  record->change_timings([&](Timings& timings) {
    timings.collect_ms =
        std::chrono::duration<double, std::milli>(save_options.collect_time).count();
  });
  base::Wait wait(base::deadline_after(std::chrono::steady_clock::now(), options.memory_wait),
                  save_options.interrupted);
  base::Turn turn(turns);
  STRANDLINE_RETURN_IF_ERROR(
      turn.begin(wait,
                 "another thread's save() was still waiting or copying at the deadline; save "
                 "less often, or raise memory_wait"));
  STRANDLINE_RETURN_IF_ERROR(check_usable());
  STRANDLINE_RETURN_IF_ERROR(checkpoint::check_arguments(step, state, save_options));
  STRANDLINE_ASSIGN_OR_RETURN(std::vector<std::string> warnings,
                              pipeline.review_failures(options.on_error));
  STRANDLINE_ASSIGN_OR_RETURN(
      std::vector<std::string> more,
      committer.prepare(step, save_options.overwrite, save_options.interrupted));
  record->change_timings([&](Timings& timings) {
    timings.prepare_ms = base::milliseconds_between(record->called(), parts.clock->now());
  });
  for (std::string& warning : warnings) record->warn(std::move(warning));
  for (std::string& warning : more) record->warn(std::move(warning));

  Staging staging;
  Status staged = stage(record, state, save_options, staging);
  record->staged(staged, record->called());
  if (staged) return Save(std::move(record));
  return end_unstaged(std::move(record), std::move(staged).error(), staging);
}

Status Checkpointer::Impl::close() {
  STRANDLINE_RETURN_IF_ERROR(check_outside_save());
  // Waits are real time, whatever clock the engine runs on.
  const auto deadline = base::deadline_after(std::chrono::steady_clock::now(), options.finish_wait);
  {
    base::Wait wait(deadline);
    base::Turn turn(turns);
    const Status last = turn.begin(wait, "a save() of another thread is still waiting or copying");
    closed.store(true);
    STRANDLINE_RETURN_IF_ERROR(last);
  }
  if (Status idle = pipeline.wait_until_idle(deadline); !idle) {
    pipeline.give_up();
    return failure(ErrorCode::kTimeout,
                   fmt::format("{} after {:.0f} s; they were cancelled", idle.error().message,
                               std::chrono::duration<double>(options.finish_wait).count()));
  }
  committer.unlock();
  snapshotter.retire();
  const std::vector<Error> errors = pipeline.failures(true);
  if (errors.empty()) return {};
  Error error = errors.back();
  error.message.clear();
  for (const Error& each : errors) {
    error.message += (error.message.empty() ? "" : "; ") + each.text();
  }
  error.cause.reset();
  return failure(std::move(error));
}

Checkpointer::Checkpointer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Checkpointer::Checkpointer(Checkpointer&&) noexcept = default;
Checkpointer& Checkpointer::operator=(Checkpointer&& other) noexcept {
  std::swap(impl_, other.impl_);
  return *this;
}

Checkpointer::~Checkpointer() {
  if (!impl_) return;
  if (base::fork_generation() != impl_->fork_generation) {
    static_cast<void>(impl_.release());  // A forked child: its locks and threads are not ours.
    return;
  }
  static_cast<void>(impl_->close());
  // What close() cancelled may still be inside a system call, which nothing bounds on a disk that
  // hangs; the memory that the kernel reads must outlive it.
  static_cast<void>(impl_->pipeline.wait_until_idle(base::Clock::Instant::max()));
}

Result<Checkpointer> CheckpointerAccess::open(std::shared_ptr<Storage> storage,
                                              CheckpointerOptions options,
                                              checkpoint::Environment environment) {
  STRANDLINE_RETURN_IF_ERROR(checkpoint::check_options(options));
  STRANDLINE_ASSIGN_OR_RETURN(std::string run, checkpoint::make_run_id());
  return Checkpointer(std::make_unique<Checkpointer::Impl>(std::move(storage), std::move(options),
                                                           std::move(run), std::move(environment)));
}

Result<Checkpointer> Checkpointer::open(std::shared_ptr<Storage> storage,
                                        CheckpointerOptions options) {
  STRANDLINE_RETURN_IF_ERROR(checkpoint::check_options(options));
  STRANDLINE_ASSIGN_OR_RETURN(checkpoint::Environment environment,
                              checkpoint::make_environment(options.copy_threads));
  return CheckpointerAccess::open(std::move(storage), std::move(options), std::move(environment));
}

Result<Checkpointer> Checkpointer::open(const std::filesystem::path& directory,
                                        CheckpointerOptions options) {
  STRANDLINE_ASSIGN_OR_RETURN(auto storage, open_posix_storage(directory));
  return open(std::move(storage), std::move(options));
}

Result<Save> Checkpointer::save(std::int64_t step, const StateDict& state,
                                const SaveOptions& options) {
  STRANDLINE_RETURN_IF_ERROR(impl_->check_usable());
  STRANDLINE_RETURN_IF_ERROR(impl_->check_outside_save());
  return base::no_throw("saving", [&] { return impl_->save(step, state, options); });
}

Result<std::optional<Restored>> Checkpointer::restore(StateDict& state,
                                                      const RestoreOptions& options) {
  STRANDLINE_RETURN_IF_ERROR(impl_->check_usable());
  STRANDLINE_RETURN_IF_ERROR(state.construction());
  // A save that is on its way is newer than what is committed.
  STRANDLINE_RETURN_IF_ERROR(wait_until_finished(impl_->options.finish_wait));
  STRANDLINE_ASSIGN_OR_RETURN(auto restored, base::no_throw("restoring", [&] {
                                return checkpoint::restore_into(*impl_->store, state, options);
                              }));
  if (!restored) return std::nullopt;
  impl_->committer.note_restored(restored->sequence);
  return std::move(restored->restored);
}

Result<std::vector<std::int64_t>> Checkpointer::steps() const {
  if (base::fork_generation() != impl_->fork_generation) {
    return failure(impl_->check_usable().error());
  }
  return base::no_throw("listing steps", [&]() -> Result<std::vector<std::int64_t>> {
    STRANDLINE_ASSIGN_OR_RETURN(const checkpoint::Catalog catalog,
                                checkpoint::Catalog::read(*impl_->store));
    std::vector<std::int64_t> steps;
    for (const StepEntry& entry : catalog.entries()) {
      if (entry.info) steps.push_back(entry.step);
    }
    return steps;
  });
}

Result<std::optional<std::int64_t>> Checkpointer::latest_step() const {
  STRANDLINE_ASSIGN_OR_RETURN(const std::vector<std::int64_t> all, steps());
  if (all.empty()) return std::nullopt;
  return all.back();
}

Status Checkpointer::wait_until_finished(std::chrono::milliseconds deadline) const {
  if (base::fork_generation() != impl_->fork_generation) return impl_->check_usable();
  STRANDLINE_RETURN_IF_ERROR(impl_->check_outside_save());
  return impl_->pipeline.wait_until_idle(
      base::deadline_after(std::chrono::steady_clock::now(), deadline));
}

std::vector<Error> Checkpointer::failures() const {
  if (base::fork_generation() != impl_->fork_generation) return {};
  return impl_->pipeline.failures(false);
}

Status Checkpointer::close() {
  if (base::fork_generation() != impl_->fork_generation) return impl_->check_usable();
  return impl_->close();
}

std::string Checkpointer::path() const { return impl_->store->path(); }
std::string Checkpointer::run() const { return impl_->run; }
std::uint64_t Checkpointer::host_bytes_mapped() const {
  return impl_->snapshotter.slab().bytes_mapped();
}

}  // namespace strandline::inline v0
