#include "checkpoint/pipeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/no_throw.h"
#include "base/result_macros.h"
#include "checkpoint/shard_writer.h"

namespace strandline::checkpoint {
namespace {

std::string failed_text(const Save::Record& record) {
  return fmt::format("the save of step {} failed: {}", record.step(),
                     record.outcome()->cause->text());
}

}  // namespace

Pipeline::Pipeline(Committer& committer, std::shared_ptr<base::Executor> executor,
                   std::shared_ptr<const base::Clock> clock, std::chrono::milliseconds segment_wait)
    : committer_(committer),
      executor_(std::move(executor)),
      clock_(std::move(clock)),
      segment_wait_(segment_wait) {}

Status Pipeline::admit(base::Wait& wait) {
  base::MutexLock lock(mutex_);
  while (in_flight_ >= kSavesInFlightMax) {
    if (wait.expired()) {
      return failure(ErrorCode::kTimeout,
                     fmt::format("{} earlier saves are still being written; save less often, or "
                                 "to a faster disk",
                                 in_flight_));
    }
    STRANDLINE_RETURN_IF_ERROR(wait.pause(changed_, mutex_));
  }
  ++in_flight_;
  return {};
}

void Pipeline::dismiss() {
  {
    base::MutexLock lock(mutex_);
    --in_flight_;
  }
  changed_.notify_all();
}

void Pipeline::submit(Job job) {
  {
    base::MutexLock lock(mutex_);
    running_.push_back(job.record);
  }
  // std::function wants copyable tasks.
  auto shared = std::make_shared<Job>(std::move(job));
  executor_->post([this, shared] { run(*shared); });
}

void Pipeline::run(Job& job) {
  const Status status =
      base::no_throw("writing the checkpoint", [&] { return write_and_commit(job); });
  Outcome outcome;
  if (!status) {
    const Status cancelled = job.record->check_cancelled();
    outcome.kind = cancelled ? Outcome::Kind::kFailed : Outcome::Kind::kSkipped;
    outcome.cause = cancelled ? status.error() : cancelled.error();
    // Wakes a save() that is still staging, and frees the memory that it may be waiting for.
    job.snapshot->abandon(*outcome.cause);
  }
  job.record->release_snapshot();
  job.snapshot.reset();
  if (job.record->take_reservation()) committer_.release(job.record->step());
  {
    base::MutexLock lock(mutex_);
    --in_flight_;
    std::erase(running_, job.record);
    if (given_up_ && in_flight_ == 0) committer_.unlock();
    end(job.record, std::move(outcome));
    // Notified under the lock: the owner may be gone as soon as it sees that nothing runs.
    changed_.notify_all();
  }
}

// The outcome is told and counted in one piece: whoever has seen it is warned of it by the next
// save.
void Pipeline::end(const std::shared_ptr<Save::Record>& record, Outcome outcome) {
  if (outcome.kind == Outcome::Kind::kFailed) {
    failed_.push_back({record});
  } else if (outcome.kind == Outcome::Kind::kCommitted) {
    for (Failed& failed : failed_) failed.in_row = false;
  }
  record->end(std::move(outcome));
}

void Pipeline::end_failed(const std::shared_ptr<Save::Record>& record, Error error) {
  base::MutexLock lock(mutex_);
  end(record, {Outcome::Kind::kFailed, std::move(error)});
}

Status Pipeline::write_and_commit(Job& job) {
  Save::Record& record = *job.record;
  STRANDLINE_RETURN_IF_ERROR(record.check_cancelled());
  const base::Clock::Instant started = clock_->now();
  STRANDLINE_ASSIGN_OR_RETURN(std::unique_ptr<PartialDirectory> partial,
                              committer_.begin(record.step()));
  const WriteObserver observer{
      .written = [&record](std::uint64_t bytes) { record.add_written(bytes); },
      .check = [&record] { return record.check_cancelled(); }};
  CommitRequest request;
  STRANDLINE_ASSIGN_OR_RETURN(
      request.shards, ShardWriter::run(*job.snapshot, *partial, *clock_, segment_wait_, observer));
  const base::Clock::Instant written = clock_->now();
  record.change_timings(
      [&](Timings& timings) { timings.write_ms = base::milliseconds_between(started, written); });
  request.step = record.step();
  request.tree = &job.tree;
  request.snapshot = job.snapshot.get();
  request.options = &job.options;
  request.last_chance = [&record] { return record.check_cancelled(true); };
  auto warnings = committer_.commit(request, std::move(partial));
  record.change_timings([&](Timings& timings) {
    timings.commit_ms = base::milliseconds_between(written, clock_->now());
  });
  STRANDLINE_RETURN_IF_ERROR(warnings);
  for (std::string& warning : *warnings) record.warn(std::move(warning));
  return {};
}

Status Pipeline::wait_until_idle(base::Clock::Instant deadline) {
  base::MutexLock lock(mutex_);
  while (in_flight_ > 0) {
    if (!changed_.wait_until(mutex_, deadline) && in_flight_ > 0) {
      return failure(ErrorCode::kTimeout,
                     fmt::format("{} saves are still being written", in_flight_));
    }
  }
  return {};
}

void Pipeline::give_up() {
  base::MutexLock lock(mutex_);
  given_up_ = true;
  for (const auto& record : running_) record->cancel();
  if (in_flight_ == 0) committer_.unlock();
}

Result<std::vector<std::string>> Pipeline::review_failures(ErrorPolicy policy) {
  base::MutexLock lock(mutex_);
  std::erase_if(failed_, [](const Failed& failed) { return failed.record->raised(); });
  const auto in_row = std::count_if(failed_.begin(), failed_.end(),
                                    [](const Failed& failed) { return failed.in_row; });
  const bool too_many = in_row >= kFailuresInRowMax;
  if (!failed_.empty() && (policy == ErrorPolicy::kRaise || too_many)) {
    Error error = *failed_.back().record->outcome()->cause;
    error.message =
        fmt::format("{}{}; this call saved nothing", failed_text(*failed_.back().record),
                    too_many ? fmt::format(" ({} failures in a row)", in_row) : std::string());
    for (const Failed& failed : failed_) failed.record->set_raised();
    failed_.clear();
    return failure(std::move(error));
  }
  std::vector<std::string> warnings;
  for (Failed& failed : failed_) {
    if (!std::exchange(failed.warned, true)) warnings.push_back(failed_text(*failed.record));
  }
  return warnings;
}

std::vector<Error> Pipeline::failures(bool raise) {
  base::MutexLock lock(mutex_);
  std::vector<Error> errors;
  for (const Failed& failed : failed_) {
    if (failed.record->raised()) continue;
    Error error = *failed.record->outcome()->cause;
    error.message = failed_text(*failed.record);
    errors.push_back(std::move(error));
    if (raise) failed.record->set_raised();
  }
  return errors;
}

}  // namespace strandline::checkpoint
