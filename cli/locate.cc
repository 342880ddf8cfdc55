#include "locate.h"

#include <sys/stat.h>

#include <algorithm>
#include <system_error>

namespace strandline::cli {
namespace {

constexpr const char* kManifestName = "manifest.json";

// Enough to see what steps there are; a message is no listing.
constexpr std::size_t kStepsNamedMax = 8;

std::string steps_text(const std::vector<StepEntry>& steps) {
  std::string text;
  const std::size_t skipped = steps.size() - std::min(steps.size(), kStepsNamedMax);
  if (skipped > 0) text = "..., ";
  for (std::size_t i = skipped; i < steps.size(); ++i) {
    text += (i > skipped ? ", " : "") + std::to_string(steps[i].step);
  }
  return text;
}

}  // namespace

bool is_checkpoint(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::exists(path / kManifestName, ignored);
}

Result<std::vector<StepEntry>> find_steps(const std::filesystem::path& directory) {
  auto steps = list_checkpoints(directory);
  if (!steps || !steps->empty()) return steps;
  return failure(Error{.code = ErrorCode::kNotFound,
                       .message = "no checkpoint in '" + directory.string() +
                                  "': it holds neither committed steps nor a manifest.json",
                       .path = directory.string()});
}

Result<StepEntry> find_step(const std::filesystem::path& directory, std::int64_t step) {
  auto steps = find_steps(directory);
  if (!steps) return failure(steps.error());
  const auto found = std::find_if(steps->begin(), steps->end(),
                                  [step](const StepEntry& entry) { return entry.step == step; });
  if (found != steps->end()) return std::move(*found);
  return failure(Error{.code = ErrorCode::kNotFound,
                       .message = "no step " + std::to_string(step) + " in '" + directory.string() +
                                  "'; there are " + steps_text(*steps),
                       .path = directory.string()});
}

std::vector<const StepEntry*> newest_first(const std::vector<StepEntry>& steps) {
  std::vector<const StepEntry*> order;
  std::vector<const StepEntry*> unreadable;  // The highest step last.
  for (const StepEntry& entry : steps) {
    if (!entry.info) unreadable.push_back(&entry);
  }
  const auto take_unreadable_above = [&](std::int64_t step) {
    while (!unreadable.empty() && unreadable.back()->step > step) {
      order.push_back(unreadable.back());
      unreadable.pop_back();
    }
  };
  for (auto entry = steps.rbegin(); entry != steps.rend(); ++entry) {
    if (!entry->info) continue;
    take_unreadable_above(entry->step);
    order.push_back(&*entry);
  }
  take_unreadable_above(-1);
  return order;
}

Error error_of_step(Error error) {
  if (error.code == ErrorCode::kNotFound) error.code = ErrorCode::kCorrupt;
  return error;
}

DirectoryIdentity directory_identity(const std::filesystem::path& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return std::nullopt;
  return std::pair<std::uint64_t, std::uint64_t>{status.st_dev, status.st_ino};
}

}  // namespace strandline::cli
