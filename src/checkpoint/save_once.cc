// save(path, state): one durable checkpoint, as simple as writing a file.
//
// The same parts as a Checkpointer's, put together for one use: `path` is the step's directory and
// its parent the storage. No writer's lock is taken, since the rename decides; leftovers of dead
// calls on the same path are recognised because nobody holds them any more.
//
// The caller's thread stages and then waits, asking whether it was interrupted; the pipeline's
// thread writes. An interruption is seen by the writer between two transfers: it removes what it
// has written, and only then does the call return.

#include <fmt/format.h>

#include <atomic>
#include <future>
#include <utility>

#include "base/no_throw.h"
#include "base/result_macros.h"
#include "base/wait.h"
#include "checkpoint/committer.h"
#include "checkpoint/environment.h"
#include "checkpoint/manifest_file.h"
#include "checkpoint/shard_writer.h"
#include "checkpoint/state_check.h"
#include "checkpoint/step_path.h"
#include "format/names.h"
#include "staging/snapshotter.h"
#include "strandline/checkpointer.h"

namespace strandline::inline v0 {
namespace {

// How long writing may wait for the next piece of staging, and staging for memory.
constexpr std::chrono::minutes kStagingWait(10);

// Where a link to a checkpoint leads, so that it is replaced there and the link stays.
std::filesystem::path without_link(const std::filesystem::path& path) {
  std::error_code error;
  const std::filesystem::path link = path.has_filename() ? path : path.parent_path();
  if (!std::filesystem::is_symlink(std::filesystem::symlink_status(link, error))) return path;
  const std::filesystem::path target = std::filesystem::canonical(path, error);
  return error ? path : target;  // A link that leads nowhere is in the way: see publish_mode().
}

Result<Publish> publish_mode(const checkpoint::StepPath& step) {
  std::error_code ignored;
  const std::string path = step.text();
  if (!std::filesystem::exists(std::filesystem::symlink_status(path, ignored))) {
    return Publish::kNew;
  }
  const auto refuse = [&](const std::string& why) {
    return failure(Error{.code = ErrorCode::kAlreadyExists,
                         .message = fmt::format("'{}' exists and {}", path, why),
                         .path = path});
  };
  const auto directory = step.storage->open(step.name);
  const auto manifest = directory ? checkpoint::read_manifest(**directory)
                                  : Result<format::Manifest>(failure(directory.error()));
  if (!manifest) {
    return refuse("is no intact Strandline checkpoint; remove it or choose another path");
  }
  STRANDLINE_ASSIGN_OR_RETURN(const std::vector<std::string> names, (*directory)->list());
  const std::vector<std::string> added = checkpoint::files_beside(manifest->info, names);
  if (added.empty()) return Publish::kReplace;
  return refuse(
      fmt::format("holds files that no save has written, which would be lost: {}; move "
                  "them away, give them as extra_files, or choose another path",
                  fmt::join(added, ", ")));
}

// Removes what dead calls on the same path left of one kind, as far as that is possible.
void sweep(const checkpoint::StepPath& step, format::DirectoryName::Kind kind) {
  const auto names = step.storage->list();
  if (!names) return;
  for (const std::string& found : *names) {
    const format::DirectoryName parsed = format::parse_directory_name(found);
    if (parsed.kind == kind && parsed.final_name == step.name) {
      static_cast<void>(step.storage->remove_if_abandoned(found));
    }
  }
}

struct OnceRequest {
  Storage& storage;
  checkpoint::CommitTarget target;
  std::string run;
  const base::Clock& clock;
  const StateDict& tree;
  const SaveOptions& options;
  std::atomic<bool> interrupted{false};
};

Status check_interrupted(const OnceRequest& once) {
  if (!once.interrupted.load()) return {};
  return failure(ErrorCode::kUnavailable, "interrupted while it was written; nothing was saved");
}

// Whether the caller wants it given up.
bool ask(OnceRequest& once) {
  if (once.options.interrupted && once.options.interrupted()) once.interrupted.store(true);
  return once.interrupted.load();
}

Status write_once(const OnceRequest& once, staging::Snapshot& snapshot) {
  STRANDLINE_ASSIGN_OR_RETURN(
      std::unique_ptr<PartialDirectory> partial,
      once.storage.begin(format::partial_directory_name(once.target.name, once.run)));
  const checkpoint::WriteObserver observer{.written = [](std::uint64_t) {},
                                           .check = [&once] { return check_interrupted(once); }};
  checkpoint::CommitRequest request;
  STRANDLINE_ASSIGN_OR_RETURN(
      request.shards,
      checkpoint::ShardWriter::run(snapshot, *partial, once.clock, kStagingWait, observer));
  request.tree = &once.tree;
  request.snapshot = &snapshot;
  request.options = &once.options;
  request.last_chance = [&once] { return check_interrupted(once); };
  STRANDLINE_ASSIGN_OR_RETURN(
      const Publication publication,
      checkpoint::write_and_publish(once.storage, once.target, once.run, false, once.clock, request,
                                    std::move(partial)));
  return publication.durable;
}

Status save_at(const std::filesystem::path& path, const StateDict& state,
               const SaveOptions& options) {
  STRANDLINE_RETURN_IF_ERROR(checkpoint::check_arguments(0, state, options));
  STRANDLINE_ASSIGN_OR_RETURN(const checkpoint::StepPath step,
                              checkpoint::split_step_path(without_link(path)));
  STRANDLINE_ASSIGN_OR_RETURN(const std::string run, checkpoint::make_run_id());
  STRANDLINE_ASSIGN_OR_RETURN(const Publish mode, publish_mode(step));
  sweep(step, format::DirectoryName::Kind::kPartial);

  const StateDict tree = checkpoint::without_memory(state);
  STRANDLINE_ASSIGN_OR_RETURN(const checkpoint::Environment parts,
                              checkpoint::make_environment(std::nullopt));
  OnceRequest once{*step.storage, {step.name, 1, std::nullopt, mode}, run, *parts.clock, tree,
                   options};
  std::promise<Status> written;
  bool started = false;
  staging::Snapshotter snapshotter({}, *parts.devices, parts.copy_workers.get(), *parts.clock);
  staging::TakeOptions take;
  take.deadline = base::deadline_after(parts.clock->now(), kStagingWait);
  take.interrupted = [&once] { return ask(once); };
  take.started = [&](std::shared_ptr<staging::Snapshot> snapshot) -> Status {
    started = true;
    parts.pipeline->post([&once, &written, snapshot = std::move(snapshot)] {
      Status status =
          base::no_throw("writing the checkpoint", [&] { return write_once(once, *snapshot); });
      if (!status) snapshot->abandon(status.error());
      written.set_value(std::move(status));
    });
    return {};
  };
  staging::TakeTimings timings;
  const auto snapshot = snapshotter.take(state, take, &timings);
  Status status;
  if (started) {
    // Without a deadline, also where the disk hangs: the writer reads memory of this call.
    std::future<Status> end = written.get_future();
    while (end.wait_for(base::kInterruptPoll) != std::future_status::ready) ask(once);
    status = end.get();
  }
  STRANDLINE_RETURN_IF_ERROR(snapshot);
  STRANDLINE_RETURN_IF_ERROR(status);
  // Readers take the old checkpoint from there while there is no new one.
  sweep(step, format::DirectoryName::Kind::kReplaced);
  return {};
}

}  // namespace

Status save(const std::filesystem::path& path, const StateDict& state, const SaveOptions& options) {
  return base::no_throw("saving", [&] { return save_at(path, state, options); });
}

}  // namespace strandline::inline v0
