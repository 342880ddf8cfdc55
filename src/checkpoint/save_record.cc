#include "checkpoint/save_record.h"

#include <fmt/format.h>

#include <utility>

#include "base/result_macros.h"

namespace strandline::inline v0 {
namespace {

tl::unexpected<Error> still_running(std::int64_t step, std::string_view phase,
                                    std::chrono::milliseconds deadline) {
  return failure(ErrorCode::kTimeout,
                 fmt::format("the save of step {} was not {} after {:.1f} s; it goes on: wait "
                             "again, or cancel it",
                             step, phase, static_cast<double>(deadline.count()) / 1000));
}

}  // namespace

Save::Record::Record(std::int64_t step, std::shared_ptr<const base::Clock> clock)
    : step_(step), clock_(std::move(clock)), called_(clock_->now()) {}

Status Save::Record::check_process() const {
  if (base::fork_generation() == fork_generation_) return {};
  return failure(ErrorCode::kUnavailable,
                 "this save belongs to the process that forked, and only that one knows about it");
}

void Save::Record::attach(std::shared_ptr<staging::Snapshot> snapshot) {
  base::MutexLock lock(mutex_);
  progress_.bytes_total = snapshot->plan().data_bytes();
  snapshot_ = std::move(snapshot);
}

void Save::Record::staged(Status status, base::Clock::Instant blocked_since) {
  {
    base::MutexLock lock(mutex_);
    timings_.blocked_ms =
        timings_.collect_ms + base::milliseconds_between(blocked_since, clock_->now());
    staged_ = std::move(status);
  }
  changed_.notify_all();
}

void Save::Record::warn(std::string text) {
  base::MutexLock lock(mutex_);
  warnings_.push_back(std::move(text));
}

Status Save::Record::check_cancelled(bool last_chance) {
  base::MutexLock lock(mutex_);
  if (cancel_asked_) {
    return failure(ErrorCode::kUnavailable,
                   fmt::format("the save of step {} was cancelled", step_));
  }
  cancel_closed_ = cancel_closed_ || last_chance;
  return {};
}

void Save::Record::end(Outcome outcome) {
  {
    base::MutexLock lock(mutex_);
    if (outcome_) return;
    if (outcome.kind == Outcome::Kind::kCommitted) {
      timings_.durable_ms =
          timings_.collect_ms + base::milliseconds_between(called_, clock_->now());
    }
    progress_.ended = true;
    outcome_ = std::move(outcome);
  }
  changed_.notify_all();
}

void Save::Record::release_snapshot() {
  std::shared_ptr<staging::Snapshot> dropped;  // Its memory is given back outside the lock.
  base::MutexLock lock(mutex_);
  if (snapshot_) progress_.bytes_staged = snapshot_->bytes_staged();
  dropped = std::move(snapshot_);
}

bool Save::Record::take_reservation() {
  base::MutexLock lock(mutex_);
  return std::exchange(reserved_, false);
}

void Save::Record::set_raised() {
  base::MutexLock lock(mutex_);
  raised_ = true;
}

bool Save::Record::raised() const {
  base::MutexLock lock(mutex_);
  return raised_;
}

Status Save::Record::wait_staged(std::chrono::milliseconds deadline) {
  const auto until = base::deadline_after(std::chrono::steady_clock::now(), deadline);
  base::MutexLock lock(mutex_);
  while (!staged_) {
    if (!changed_.wait_until(mutex_, until) && !staged_) {
      return still_running(step_, "staged", deadline);
    }
  }
  return *staged_;
}

Result<Outcome> Save::Record::wait_durable(std::chrono::milliseconds deadline) {
  const auto until = base::deadline_after(std::chrono::steady_clock::now(), deadline);
  base::MutexLock lock(mutex_);
  while (!outcome_) {
    if (!changed_.wait_until(mutex_, until) && !outcome_) {
      return still_running(step_, "durable", deadline);
    }
  }
  if (outcome_->kind == Outcome::Kind::kFailed) {
    raised_ = true;
    return failure(*outcome_->cause);
  }
  return *outcome_;
}

std::optional<Outcome> Save::Record::outcome() const {
  base::MutexLock lock(mutex_);
  return outcome_;
}

Progress Save::Record::progress() const {
  base::MutexLock lock(mutex_);
  Progress progress = progress_;
  if (snapshot_) progress.bytes_staged = snapshot_->bytes_staged();
  progress.bytes_written = bytes_written_.load();
  return progress;
}

Timings Save::Record::timings() const {
  base::MutexLock lock(mutex_);
  return timings_;
}

std::vector<std::string> Save::Record::warnings() const {
  base::MutexLock lock(mutex_);
  return warnings_;
}

bool Save::Record::cancel() {
  base::MutexLock lock(mutex_);
  if (!cancel_closed_ && !outcome_) cancel_asked_ = true;
  return cancel_asked_;
}

// ---- Save: a handle of its record ----

// In a forked child the record's lock may be held for ever, by a thread that does not exist there.

std::int64_t Save::step() const { return record_->step(); }
Status Save::wait_staged(std::chrono::milliseconds deadline) const {
  STRANDLINE_RETURN_IF_ERROR(record_->check_process());
  return record_->wait_staged(deadline);
}
Result<Outcome> Save::wait_durable(std::chrono::milliseconds deadline) const {
  STRANDLINE_RETURN_IF_ERROR(record_->check_process());
  return record_->wait_durable(deadline);
}
std::optional<Outcome> Save::outcome() const {
  if (!record_->check_process()) return std::nullopt;
  return record_->outcome();
}
Progress Save::progress() const {
  return record_->check_process() ? record_->progress() : Progress{};
}
Timings Save::timings() const { return record_->check_process() ? record_->timings() : Timings{}; }
std::vector<std::string> Save::warnings() const {
  return record_->check_process() ? record_->warnings() : std::vector<std::string>{};
}
void Save::cancel() const {
  if (record_->check_process()) record_->cancel();
}

std::string Save::summary() const {
  if (const Status ours = record_->check_process(); !ours) {
    return fmt::format("step {}: {}", step(), ours.error().message);
  }
  const Timings timings = record_->timings();
  std::string text = fmt::format("step {}: blocked {:.0f} ms (collect {:.0f}", step(),
                                 timings.blocked_ms, timings.collect_ms);
  if (timings.prepare_ms >= 0.5) text += fmt::format(", prepare {:.0f}", timings.prepare_ms);
  text += fmt::format(", plan {:.0f}", timings.plan_ms);
  if (timings.wait_ms >= 0.5) text += fmt::format(", wait {:.0f}", timings.wait_ms);
  text += fmt::format(", copy {:.0f})", timings.copy_ms);
  const auto outcome = record_->outcome();
  if (!outcome) return text + ", running, mode copy";
  switch (outcome->kind) {
    case Outcome::Kind::kCommitted: {
      const double bytes = static_cast<double>(record_->progress().bytes_total);
      text += fmt::format(", durable in {:.2f} s, {:.1f} GB/s", timings.durable_ms / 1000,
                          timings.durable_ms > 0 ? bytes / timings.durable_ms / 1e6 : 0.0);
      break;
    }
    case Outcome::Kind::kFailed:
      text += ", failed: " + outcome->cause->text();
      break;
    case Outcome::Kind::kSkipped:
      text += ", skipped: " + outcome->cause->text();
      break;
  }
  return text + ", mode copy";
}

}  // namespace strandline::inline v0
