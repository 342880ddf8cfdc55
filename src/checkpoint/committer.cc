// The commit protocol.
//
// A step's files are written into a partial directory that no reader looks at, in this order:
//
//   shards, each synced          by the ShardWriter; their bytes are on the disk before anything
//                                names them
//   rank file, synced            the chunk digests of what was written
//   indexes, extra files, synced
//   manifest, synced             written last: a directory with a manifest is complete
//   read back                    sizes, manifest, headers and rank files (the data too, if asked)
//   publish                      sync the directory, rename it to its final name, sync the parent
//   prune                        only now may anything older go
//
// A crash before the rename leaves a partial directory, which the next writer sweeps. A crash after
// it leaves the new step, complete. There is no moment at which neither the old nor the new step is
// there. If the very last sync fails, the step is visible but may not survive a power cut: the save
// has failed, the step counts as existing, and nothing is pruned.
//
// What is listed in the partial directory right before publishing must be exactly what was written,
// so that a file planted by a dead run cannot come along.
//
// Replacing. A step is refused if this run committed it, or if it is an ancestor of what the job
// descends from and intact. A damaged step, or one of an abandoned branch, is replaced and the
// caller told. `overwrite` replaces whatever is there. A step that cannot be read just now, or was
// written by a newer version, is neither: it is kept, and the save is refused with the cause. The
// same holds for what is no checkpoint at all, whatever was asked for: a file, or a directory
// without a manifest that holds anything but what saves write, is somebody else's. And the same
// holds when becoming the writer, since the next sequence must be above all that exist.

#include "checkpoint/committer.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/result_macros.h"
#include "base/wait.h"
#include "checkpoint/manifest_file.h"
#include "format/digest.h"
#include "format/index_file.h"
#include "format/manifest.h"
#include "format/names.h"
#include "format/rank_file.h"

namespace strandline::checkpoint {
namespace {

// Writes one small file, whole, and syncs it.
Result<FileInfo> write_file(PartialDirectory& directory, std::string name, std::string group,
                            const std::string& content) {
  STRANDLINE_ASSIGN_OR_RETURN(const auto file, directory.create(name, content.size()));
  Status written;
  // Storages may complete writes later, on another thread.
  base::Mutex mutex;
  base::ConditionVariable changed;
  bool done = false;
  file->write_at(0, std::as_bytes(std::span(content)), [&](Status status) {
    base::MutexLock lock(mutex);
    written = std::move(status);
    done = true;
    changed.notify_all();
  });
  {
    base::MutexLock lock(mutex);
    while (!done) changed.wait(mutex);
  }
  STRANDLINE_RETURN_IF_ERROR(written);
  STRANDLINE_RETURN_IF_ERROR(file->sync());
  FileInfo info;
  info.name = std::move(name);
  info.bytes = content.size();
  info.group = std::move(group);
  info.header_digest = format::digest_of(content).hex();
  return info;
}

std::string rank_file_content(const CommitRequest& request, const std::string& run) {
  format::RankFile rank_file;
  rank_file.run = run;
  rank_file.step = request.step;
  const std::vector<staging::FilePlan>& files = request.snapshot->plan().files;
  for (std::uint32_t i = 0; i < files.size(); ++i) {
    format::RankFile::Shard shard;
    shard.name = files[i].name;
    for (std::uint32_t j = 0; j < files[i].tensors.size(); ++j) {
      const staging::PlacedTensor& tensor = files[i].tensors[j];
      shard.tensors.push_back({tensor.name, tensor.bytes, request.snapshot->digests(i, j)});
    }
    rank_file.shards.push_back(std::move(shard));
  }
  return format::write_rank_file(rank_file);
}

std::string index_content(const staging::FilePlan& file) {
  std::vector<std::pair<std::string, std::string>> weights;
  for (const staging::PlacedTensor& tensor : file.tensors) {
    weights.emplace_back(tensor.name, file.name);
  }
  return format::write_index_file(file.data_bytes, weights);
}

std::vector<format::TensorEntry> tensor_entries(const staging::Plan& plan,
                                                const Structure& structure) {
  std::vector<format::TensorEntry> entries(plan.placements.size());
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const staging::Placement& placement = plan.placements[i];
    if (placement.alias_of) {
      entries[i].alias = {*placement.alias_of, placement.alias_offset_bytes};
      continue;
    }
    const staging::FilePlan& file = plan.files[placement.file];
    const std::vector<std::uint64_t>& shape = structure.tensors()[i].shape;
    entries[i].parts.push_back({file.name, file.tensors[placement.index].name,
                                std::vector<std::uint64_t>(shape.size(), 0), shape});
  }
  return entries;
}

// Everything beside the shards, the manifest last. Returns the names of all files of the step.
Result<std::vector<std::string>> write_small_files(PartialDirectory& partial,
                                                   const CommitTarget& target,
                                                   const std::string& run, const base::Clock& clock,
                                                   const CommitRequest& request) {
  format::Manifest manifest;
  manifest.info.files = request.shards;
  const auto add = [&](std::string name, std::string group, const std::string& content) -> Status {
    STRANDLINE_ASSIGN_OR_RETURN(FileInfo info,
                                write_file(partial, std::move(name), std::move(group), content));
    manifest.info.files.push_back(std::move(info));
    return {};
  };
  STRANDLINE_RETURN_IF_ERROR(add(format::rank_file_name(0), "", rank_file_content(request, run)));
  const staging::Plan& plan = request.snapshot->plan();
  for (const staging::FilePlan& file : plan.files) {
    STRANDLINE_RETURN_IF_ERROR(add(file.index_name, file.group, index_content(file)));
  }
  for (const auto& [name, content] : request.options->extra_files) {
    STRANDLINE_RETURN_IF_ERROR(add(name, "", content));
  }
  manifest.info.run = run;
  manifest.info.step = request.step;
  manifest.info.sequence = target.sequence;
  manifest.info.parent = target.parent;
  manifest.info.created_ns = clock.unix_ns();
  manifest.info.metrics = request.options->metrics;
  manifest.info.metadata = request.options->metadata;
  manifest.tree = *request.tree;
  manifest.entries = tensor_entries(plan, request.tree->structure());
  STRANDLINE_ASSIGN_OR_RETURN(const std::string text, format::write_manifest(manifest));
  std::vector<std::string> names{std::string(format::kManifestName)};
  for (const FileInfo& file : manifest.info.files) names.push_back(file.name);
  STRANDLINE_RETURN_IF_ERROR(write_file(partial, names.front(), "", text));
  return names;
}

// Exactly what we wrote may be published.
Status check_listing(PartialDirectory& partial, std::vector<std::string> written) {
  STRANDLINE_ASSIGN_OR_RETURN(const std::vector<std::string> found, partial.list());
  std::sort(written.begin(), written.end());
  if (found == written) return {};
  std::string strangers;
  for (const std::string& name : found) {
    if (!std::binary_search(written.begin(), written.end(), name)) strangers += " '" + name + "'";
  }
  return failure(ErrorCode::kIo,
                 "the partial directory does not hold what was written into it: somebody else "
                 "writes there; unexpected:" +
                     (strangers.empty() ? " nothing, but files are missing" : strangers));
}

// Whether a step's own bytes are at fault: neither the way to them nor our age.
bool may_be_given_up(const Error& error) {
  return error.code == ErrorCode::kCorrupt || error.code == ErrorCode::kNotFound;
}

Error unknown_step(const StepEntry& entry) {
  return Error{.code = entry.error->code,
               .message = fmt::format("nothing was saved, because the manifest of '{}' cannot be "
                                      "read and its place in the sequence is unknown; if it is not "
                                      "needed any more, move it away: {}",
                                      entry.name, entry.error->message),
               .path = entry.error->path,
               .system_errno = entry.error->system_errno};
}

// Whether a save may have written a file of this name.
bool may_be_ours(const std::string& name) {
  return name.ends_with(".safetensors") || name.ends_with(".index.json") ||
         (name.starts_with("rank-") && name.ends_with(".json"));
}

// Whatever stands at `name` is a checkpoint, or the remains of one.
Status check_not_foreign(Storage& storage, const std::string& name) {
  const std::string where = storage.path() + "/" + name;
  const auto refuse = [&](const std::string& why) {
    return failure(Error{.code = ErrorCode::kAlreadyExists,
                         .message = fmt::format("'{}' is in the way of this save: {}; move it "
                                                "away, or save another step",
                                                where, why),
                         .path = where});
  };
  auto directory = storage.open(name);
  if (!directory && directory.error().code == ErrorCode::kNotFound) {
    return refuse("it is not a directory");
  }
  STRANDLINE_RETURN_IF_ERROR(directory);
  const Result<std::uint64_t> manifest = (*directory)->file_bytes(format::kManifestName);
  if (manifest || manifest.error().code != ErrorCode::kNotFound) return {};
  STRANDLINE_ASSIGN_OR_RETURN(const std::vector<std::string> names, (*directory)->list());
  const auto foreign = std::find_if_not(names.begin(), names.end(), may_be_ours);
  if (foreign == names.end()) return {};
  return refuse(fmt::format("it has no manifest, but '{}', which no save has written", *foreign));
}

// What somebody has put beside the files of a step goes with it: named here, if there is any.
std::vector<std::string> warn_of_added_files(Storage& storage, const std::string& name) {
  const auto directory = storage.open(name);
  if (!directory) return {};
  const auto manifest = read_manifest(**directory);
  const auto names = (*directory)->list();
  if (!manifest || !names) return {};
  const std::vector<std::string> added = files_beside(manifest->info, *names);
  if (added.empty()) return {};
  return {fmt::format("'{}/{}' is replaced, and with it files that no save has written: {}",
                      storage.path(), name, fmt::join(added, ", "))};
}

// Asks `interrupted` as rarely as a wait does: it may be slow.
ProgressCallback unless(const std::function<bool()>& interrupted) {
  if (!interrupted) return nullptr;
  auto next = std::chrono::steady_clock::now();
  return [&interrupted, next](std::uint64_t, std::uint64_t) mutable {
    const auto now = std::chrono::steady_clock::now();
    if (now < next) return true;
    next = now + base::kInterruptPoll;
    return !interrupted();
  };
}

// What is damaged about a step, the data included; nothing if it is intact.
Result<std::optional<std::string>> damage_of(Storage& storage, const std::string& name,
                                             const std::function<bool()>& interrupted) {
  STRANDLINE_ASSIGN_OR_RETURN(auto directory, storage.open(name));
  const Result<Checkpoint> checkpoint = Checkpoint::open(std::move(directory));
  if (!checkpoint) {
    if (!may_be_given_up(checkpoint.error())) return failure(checkpoint.error());
    return checkpoint.error().text();
  }
  STRANDLINE_ASSIGN_OR_RETURN(const std::vector<Damage> damages,
                              checkpoint->verify(unless(interrupted)));
  // A file that was added later is no reason to delete a step.
  const auto damage = std::find_if_not(damages.begin(), damages.end(),
                                       [](const Damage& found) { return found.unlisted; });
  if (damage == damages.end()) return std::nullopt;
  Error error{.code = damage->code,
              .message = fmt::format("nothing was saved, because it cannot be told whether '{}' is "
                                     "intact: {}",
                                     name, damage->message),
              .path = fmt::format("{}/{}/{}", storage.path(), name, damage->file),
              .system_errno = damage->system_errno};
  if (!may_be_given_up(error)) return failure(std::move(error));
  return damage->message;
}

Status read_back(Storage& storage, const std::string& partial_name, bool verify_data) {
  STRANDLINE_ASSIGN_OR_RETURN(auto directory, storage.open(partial_name));
  STRANDLINE_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::open(std::move(directory)));
  if (!verify_data) return {};
  STRANDLINE_ASSIGN_OR_RETURN(const std::vector<Damage> damages, checkpoint.verify());
  if (damages.empty()) return {};
  return failure(
      Error{.code = ErrorCode::kCorrupt,
            .message = "what was written reads back differently: " + damages.front().message,
            .key_path = damages.front().key_path,
            .path = damages.front().file});
}

}  // namespace

Result<Publication> write_and_publish(Storage& storage, const CommitTarget& target,
                                      const std::string& run, bool verify_data,
                                      const base::Clock& clock, const CommitRequest& request,
                                      std::unique_ptr<PartialDirectory> partial) {
  STRANDLINE_ASSIGN_OR_RETURN(std::vector<std::string> names,
                              write_small_files(*partial, target, run, clock, request));
  STRANDLINE_RETURN_IF_ERROR(check_listing(*partial, std::move(names)));
  STRANDLINE_RETURN_IF_ERROR(
      read_back(storage, format::partial_directory_name(target.name, run), verify_data));
  STRANDLINE_RETURN_IF_ERROR(request.last_chance());
  return storage.publish(std::move(partial), target.name, target.mode);
}

Committer::Committer(std::shared_ptr<Storage> storage, CheckpointerOptions options, std::string run,
                     const base::Clock& clock)
    : storage_(std::move(storage)),
      options_(std::move(options)),
      run_(std::move(run)),
      clock_(clock) {}

Result<std::vector<std::string>> Committer::prepare(std::int64_t step, bool overwrite,
                                                    const std::function<bool()>& interrupted) {
  base::MutexLock lock(mutex_);
  STRANDLINE_RETURN_IF_ERROR(become_writer());
  if (reserved_.contains(step) && !overwrite) {
    return failure(
        ErrorCode::kAlreadyExists,
        fmt::format("step {} is being saved already; pass overwrite to save it again", step));
  }
  STRANDLINE_ASSIGN_OR_RETURN(std::vector<std::string> warnings,
                              check_existing(step, overwrite, interrupted));
  reserved_.insert(step);
  return warnings;
}

void Committer::release(std::int64_t step) {
  base::MutexLock lock(mutex_);
  const auto found = reserved_.find(step);
  if (found != reserved_.end()) reserved_.erase(found);
}

Status Committer::become_writer() {
  if (lock_ && lock_->held()) return {};
  // Somebody may have removed the storage, lock and all, while the job ran.
  lock_.reset();
  STRANDLINE_ASSIGN_OR_RETURN(std::unique_ptr<WriterLock> writer_lock,
                              storage_->lock(options_.opened_at));
  STRANDLINE_ASSIGN_OR_RETURN(const Catalog catalog, Catalog::read(*storage_));
  for (const StepEntry& entry : catalog.entries()) {
    if (entry.error && !may_be_given_up(*entry.error)) return failure(unknown_step(entry));
  }
  STRANDLINE_ASSIGN_OR_RETURN(const std::vector<std::string> names, storage_->list());
  // Sweeping is a courtesy: what cannot be removed now is tried again by the next writer.
  for (const std::string& name : names) {
    const format::DirectoryName parsed = format::parse_directory_name(name);
    using Kind = format::DirectoryName::Kind;
    if (parsed.kind == Kind::kPartial && parsed.id != run_) {
      static_cast<void>(storage_->remove_if_abandoned(name));
    } else if (parsed.kind == Kind::kDeleting) {
      static_cast<void>(storage_->remove(name));
    } else if (parsed.kind == Kind::kReplaced) {
      const auto step = format::parse_step_directory_name(parsed.final_name);
      const StepEntry* entry = step ? catalog.find(*step) : nullptr;
      // Readers take the old step from here while the new one is absent.
      if (entry != nullptr && entry->name != name && entry->info) {
        static_cast<void>(storage_->remove(name));
      }
    }
  }
  highest_sequence_ = std::max(highest_sequence_, catalog.highest_sequence());
  lock_ = std::move(writer_lock);
  return {};
}

Result<std::vector<std::string>> Committer::check_existing(
    std::int64_t step, bool overwrite, const std::function<bool()>& interrupted) {
  // Names first: reading every manifest at each save would cost more with every step kept.
  STRANDLINE_ASSIGN_OR_RETURN(const std::vector<std::string> names, storage_->list());
  const std::string final_name = format::step_directory_name(step);
  std::vector<std::string> warnings;
  if (std::binary_search(names.begin(), names.end(), final_name)) {
    STRANDLINE_RETURN_IF_ERROR(check_not_foreign(*storage_, final_name));
    warnings = warn_of_added_files(*storage_, final_name);
  }
  if (overwrite) return warnings;
  const bool taken = std::any_of(names.begin(), names.end(), [&](const std::string& name) {
    return format::parse_directory_name(name).final_name == final_name;
  });
  if (!taken) return warnings;
  STRANDLINE_ASSIGN_OR_RETURN(const Catalog catalog, Catalog::read(*storage_));
  const StepEntry* existing = catalog.find(step);
  if (existing == nullptr) return warnings;
  const std::string where = storage_->path() + "/" + existing->name;
  if (existing->error && !may_be_given_up(*existing->error))
    return failure(unknown_step(*existing));
  const auto replaced = [&](const std::string& why) {
    warnings.push_back(fmt::format("step {} ('{}') {}", step, where, why));
    return warnings;
  };
  if (!existing->info) {
    return replaced("is unreadable and is replaced: " + existing->error->text());
  }
  const bool own = existing->info->run == run_;
  if (!own && (!parent_ || !catalog.is_ancestor(existing->info->sequence, *parent_))) {
    return replaced("belongs to a branch that this run does not descend from, and is replaced");
  }
  if (!own) {
    STRANDLINE_ASSIGN_OR_RETURN(const std::optional<std::string> damage,
                                damage_of(*storage_, existing->name, interrupted));
    if (damage) return replaced("is damaged and is replaced: " + *damage);
  }
  return failure(Error{.code = ErrorCode::kAlreadyExists,
                       .message = fmt::format("step {} is committed already in '{}'; save another "
                                              "step, or pass overwrite to replace it",
                                              step, where),
                       .path = where});
}

Result<std::unique_ptr<PartialDirectory>> Committer::begin(std::int64_t step) {
  return storage_->begin(format::partial_directory_name(format::step_directory_name(step), run_));
}

Result<std::vector<std::string>> Committer::commit(const CommitRequest& request,
                                                   std::unique_ptr<PartialDirectory> partial) {
  CommitTarget target;
  target.name = format::step_directory_name(request.step);
  // prepare() decided that whatever stands there may go.
  target.mode = Publish::kReplace;
  {
    base::MutexLock lock(mutex_);
    target.sequence = highest_sequence_ + 1;
    target.parent = parent_;
  }
  STRANDLINE_ASSIGN_OR_RETURN(const Publication publication,
                              write_and_publish(*storage_, target, run_, options_.verify_data,
                                                clock_, request, std::move(partial)));
  {
    base::MutexLock lock(mutex_);
    highest_sequence_ = target.sequence;
    parent_ = target.sequence;
  }
  if (!publication.durable) {
    return failure(
        Error{.code = ErrorCode::kIo,
              .message = fmt::format("step {} was published but may not survive a power cut: its "
                                     "directory could not be synced; nothing older was deleted",
                                     request.step),
              .path = storage_->path() + "/" + target.name,
              .system_errno = publication.durable.error().system_errno,
              .cause = std::make_shared<const Error>(publication.durable.error())});
  }
  return prune();
}

std::vector<std::string> Committer::prune() {
  std::vector<std::string> warnings;
  if (!options_.keep) return warnings;
  const Result<Catalog> catalog = Catalog::read(*storage_);
  if (!catalog) {
    warnings.push_back("older checkpoints were not pruned: " + catalog.error().text());
    return warnings;
  }
  std::uint32_t kept = 0;
  for (auto entry = catalog->entries().rbegin(); entry != catalog->entries().rend(); ++entry) {
    if (!entry->info || ++kept <= *options_.keep) continue;
    const Status removed = storage_->remove(entry->name);
    if (!removed) {
      warnings.push_back(
          fmt::format("step {} was not pruned: {}", entry->step, removed.error().text()));
    }
  }
  return warnings;
}

void Committer::note_restored(std::uint64_t sequence) {
  base::MutexLock lock(mutex_);
  parent_ = sequence;
  // A commit comes after its parent even if somebody removed that meanwhile.
  highest_sequence_ = std::max(highest_sequence_, sequence);
}

void Committer::unlock() {
  base::MutexLock lock(mutex_);
  lock_.reset();
}

}  // namespace strandline::checkpoint
