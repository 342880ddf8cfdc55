#include "checkpoint/catalog.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "base/result_macros.h"
#include "checkpoint/manifest_file.h"
#include "format/names.h"

namespace strandline::checkpoint {
namespace {

// Where steps vanish between listing and opening, a newer one has appeared that the list does not
// have: look again. A writer prunes at most a few steps while we look; more is somebody else.
constexpr int kAttemptsMax = 16;

StepEntry read_entry(Storage& storage, const std::string& name, std::int64_t step) {
  StepEntry entry;
  entry.name = name;
  entry.step = step;
  auto directory = storage.open(name);
  if (!directory) {
    entry.error = std::move(directory).error();
    return entry;
  }
  auto info = read_info(**directory);
  if (!info) {
    entry.error = std::move(info).error();
  } else if (info->step != step) {
    entry.error = Error{.code = ErrorCode::kCorrupt,
                        .message = "the manifest of '" + name + "' is that of step " +
                                   std::to_string(info->step) + "; was the directory renamed?",
                        .path = (*directory)->path()};
  } else {
    entry.info = std::move(*info);
  }
  return entry;
}

std::uint64_t sequence_of(const StepEntry& entry) { return entry.info ? entry.info->sequence : 0; }

}  // namespace

Result<CheckpointInfo> read_info(ReadableDirectory& directory) {
  STRANDLINE_ASSIGN_OR_RETURN(format::Manifest manifest, read_manifest(directory));
  return std::move(manifest.info);
}

Error with_remedy(Error error) {
  if (error.code != ErrorCode::kCorrupt) return error;
  error.message +=
      "; take another step, or bring back a copy of this one (`strandline verify` lists the "
      "damage)";
  return error;
}

Error steps_keep_vanishing(const Storage& storage) {
  return Error{.code = ErrorCode::kIo,
               .message = "steps keep vanishing while they are read in '" + storage.path() +
                          "'; does something other than this job delete them?",
               .path = storage.path()};
}

Result<Catalog> Catalog::read(Storage& storage) {
  std::set<std::string> vanished_before;
  for (int attempt = 1;; ++attempt) {
    std::set<std::string> vanished;
    STRANDLINE_ASSIGN_OR_RETURN(Catalog catalog, read_once(storage, vanished));
    // What is listed again and again, but not there, is no step, or one without a manifest.
    if (vanished.empty() || vanished == vanished_before) return catalog;
    // Never an incomplete catalog: an empty one would make a job begin at 0.
    if (attempt == kAttemptsMax) return failure(steps_keep_vanishing(storage));
    vanished_before = std::move(vanished);
  }
}

Result<Catalog> Catalog::read_once(Storage& storage, std::set<std::string>& vanished) {
  STRANDLINE_ASSIGN_OR_RETURN(const std::vector<std::string> names, storage.list());
  std::map<std::int64_t, StepEntry> steps;
  std::vector<std::pair<std::string, std::int64_t>> replaced;
  for (const std::string& name : names) {
    const format::DirectoryName parsed = format::parse_directory_name(name);
    const auto step = format::parse_step_directory_name(parsed.final_name);
    if (!step) continue;
    if (parsed.kind == format::DirectoryName::Kind::kStep) {
      steps.emplace(*step, read_entry(storage, name, *step));
    } else if (parsed.kind == format::DirectoryName::Kind::kReplaced) {
      replaced.emplace_back(name, *step);
    }
  }
  for (const auto& [name, step] : replaced) {
    if (steps.contains(step)) continue;
    StepEntry entry = read_entry(storage, name, step);
    if (entry.info) steps.emplace(step, std::move(entry));
  }
  Catalog catalog;
  for (auto& [step, entry] : steps) {
    // A step or manifest that vanished while we looked was pruned or replaced.
    if (entry.error && entry.error->code == ErrorCode::kNotFound) {
      vanished.insert(entry.name);
      if (!storage.open(entry.name)) continue;
    }
    catalog.entries_.push_back(std::move(entry));
  }
  std::stable_sort(
      catalog.entries_.begin(), catalog.entries_.end(),
      [](const StepEntry& a, const StepEntry& b) { return sequence_of(a) < sequence_of(b); });
  return catalog;
}

const StepEntry* Catalog::find(std::int64_t step) const {
  for (const StepEntry& entry : entries_) {
    if (entry.step == step) return &entry;
  }
  return nullptr;
}

const StepEntry* Catalog::find_sequence(std::uint64_t sequence) const {
  for (const StepEntry& entry : entries_) {
    if (entry.info && entry.info->sequence == sequence) return &entry;
  }
  return nullptr;
}

std::uint64_t Catalog::highest_sequence() const {
  return entries_.empty() ? 0 : sequence_of(entries_.back());
}

bool Catalog::is_ancestor(std::uint64_t sequence, std::uint64_t descendant) const {
  // Sequences fall strictly along the chain, so that hostile manifests cannot make it a circle.
  while (sequence < descendant) {
    const StepEntry* entry = find_sequence(descendant);
    if (entry == nullptr) return true;
    const auto& parent = entry->info->parent;
    if (!parent || *parent >= descendant) return false;
    descendant = *parent;
  }
  return sequence == descendant;
}

}  // namespace strandline::checkpoint
