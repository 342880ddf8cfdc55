#include "checkpoint/newest.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/result_macros.h"
#include "checkpoint/catalog.h"

namespace strandline::checkpoint {
namespace {

// A writer commits and prunes at most a few steps while a reader opens one; more restarts than this
// mean that something else deletes steps.
constexpr int kRestartsMax = 16;

// Whether the bytes of a step are at fault. Missing rights, descriptors or memory are not: an older
// step in place of an intact one would lose work, and fail the same way if it did not.
bool is_damage(const Error& error) {
  if (error.code == ErrorCode::kCorrupt) return true;
  if (error.code != ErrorCode::kIo) return false;
  // What file systems answer where the medium, or what lies on it, is broken.
  const int system = error.system_errno;
  return system == EIO || system == EUCLEAN || system == EBADMSG || system == ESTALE;
}

// The outcome of one walk from the newest to the oldest.
struct Walk {
  std::optional<Checkpoint> used;
  bool vanished = false;
  std::vector<std::string> causes;
};

// A step without one of its files is damaged; `use` may fail with kNotFound for its own reasons.
Error as_damage(Error error) {
  if (error.code == ErrorCode::kNotFound) error.code = ErrorCode::kCorrupt;
  return error;
}

Result<Checkpoint> open_and_use(Storage& storage, const StepEntry& entry,
                                const std::function<Status(const Checkpoint&)>& use) {
  if (!entry.info) return failure(as_damage(*entry.error));
  auto directory = storage.open(entry.name);
  if (!directory) return failure(as_damage(std::move(directory).error()));
  Result<Checkpoint> checkpoint = Checkpoint::open(std::move(*directory));
  if (!checkpoint) return failure(as_damage(std::move(checkpoint).error()));
  STRANDLINE_RETURN_IF_ERROR(use(*checkpoint));
  return checkpoint;
}

// Whether another process pruned or replaced the step since the catalog was read.
bool has_changed(Storage& storage, const StepEntry& entry) {
  if (!entry.info) return false;
  const auto directory = storage.open(entry.name);
  if (!directory) return directory.error().code == ErrorCode::kNotFound;
  const Result<CheckpointInfo> info = read_info(**directory);
  return info && (info->run != entry.info->run || info->sequence != entry.info->sequence);
}

// Readable entries newest first; unreadable ones, whose sequence is unknown, by their step among
// them: before the first readable entry of a lower step.
std::vector<const StepEntry*> newest_first(const Catalog& catalog) {
  std::vector<const StepEntry*> order;
  std::vector<const StepEntry*> unreadable;
  for (const StepEntry& entry : catalog.entries()) {
    if (!entry.info) unreadable.push_back(&entry);  // By step, since the catalog is stable.
  }
  const auto take_unreadable_above = [&](std::int64_t step) {
    while (!unreadable.empty() && unreadable.back()->step > step) {
      order.push_back(unreadable.back());
      unreadable.pop_back();
    }
  };
  for (auto entry = catalog.entries().rbegin(); entry != catalog.entries().rend(); ++entry) {
    if (!entry->info) continue;
    take_unreadable_above(entry->step);
    order.push_back(&*entry);
  }
  take_unreadable_above(-1);
  return order;
}

// Names the steps that are there, newest first; the others in number, where there are many.
Error no_such_step(const Storage& storage, const Catalog& catalog, std::int64_t step) {
  constexpr std::size_t kStepsNamedMax = 20;
  std::vector<std::int64_t> steps;
  for (const StepEntry* entry : newest_first(catalog)) steps.push_back(entry->step);
  const std::size_t named = std::min(steps.size(), kStepsNamedMax);
  std::string known =
      fmt::format("it has, newest first: {}",
                  fmt::join(steps.begin(), steps.begin() + static_cast<int>(named), ", "));
  if (named < steps.size()) known += fmt::format(" and {} more", steps.size() - named);
  return Error{.code = ErrorCode::kNotFound,
               .message = fmt::format("there is no committed step {} in '{}'; {}", step,
                                      storage.path(), known),
               .path = storage.path()};
}

Result<Walk> walk(Storage& storage, const Catalog& catalog, std::optional<std::int64_t> step,
                  const std::function<Status(const Checkpoint&)>& use) {
  Walk walk;
  for (const StepEntry* entry : newest_first(catalog)) {
    if (step && entry->step != *step) continue;
    Result<Checkpoint> used = open_and_use(storage, *entry, use);
    if (used) {
      walk.used = std::move(*used);
      return walk;
    }
    if (!is_damage(used.error())) {
      Error error = std::move(used).error();
      for (const std::string& cause : walk.causes) error.message += "; " + cause;
      return failure(std::move(error));
    }
    if (has_changed(storage, *entry)) {
      walk.vanished = true;
      return walk;
    }
    if (step) return failure(with_remedy(std::move(used).error()));
    walk.causes.push_back(fmt::format("step {} was skipped: {}", entry->step, used.error().text()));
  }
  return walk;
}

}  // namespace

Result<std::optional<Checkpoint>> use_newest(Storage& storage, std::optional<std::int64_t> step,
                                             const std::function<Status(const Checkpoint&)>& use,
                                             std::vector<std::string>& warnings) {
  for (int restart = 0; restart < kRestartsMax; ++restart) {
    STRANDLINE_ASSIGN_OR_RETURN(const Catalog catalog, Catalog::read(storage));
    if (catalog.entries().empty()) return std::nullopt;
    if (step && catalog.find(*step) == nullptr) {
      return failure(no_such_step(storage, catalog, *step));
    }
    STRANDLINE_ASSIGN_OR_RETURN(Walk walked, walk(storage, catalog, step, use));
    if (walked.vanished) continue;
    if (walked.used) {
      for (std::string& cause : walked.causes) warnings.push_back(std::move(cause));
      return std::move(walked.used);
    }
    return failure(Error{
        .code = ErrorCode::kCorrupt,
        .message =
            fmt::format("none of the {} checkpoints in '{}' can be used: {}; bring back a copy of "
                        "one, or begin in another directory",
                        catalog.entries().size(), storage.path(), fmt::join(walked.causes, "; ")),
        .path = storage.path()});
  }
  return failure(steps_keep_vanishing(storage));
}

}  // namespace strandline::checkpoint
