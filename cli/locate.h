// Finds what a command line names: one checkpoint, or a directory of them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

#include "strandline/checkpoint.h"

namespace strandline::cli {

// Whether `path` is one checkpoint, that is, holds a manifest.
[[nodiscard]] bool is_checkpoint(const std::filesystem::path& path);

// The committed steps of a directory of checkpoints, as list_checkpoints() gives them. Fails with
// kNotFound also if there are none.
[[nodiscard]] Result<std::vector<StepEntry>> find_steps(const std::filesystem::path& directory);

// The entry of a step. Fails with kNotFound, naming the steps that there are.
[[nodiscard]] Result<StepEntry> find_step(const std::filesystem::path& directory,
                                          std::int64_t step);

// The order in which a restore tries steps: readable ones newest commit first; each unreadable one,
// whose commit is unknown, before the first readable one of a lower step. REQUIRES: as find_steps()
// gives them. The result points into `steps`.
[[nodiscard]] std::vector<const StepEntry*> newest_first(const std::vector<StepEntry>& steps);

// The error of a step that is known to exist, as the tool reports it: what is missing in a
// committed step is damage.
[[nodiscard]] Error error_of_step(Error error);

// What tells a directory from one that took its place; nothing if there is none. A training job may
// replace or delete a step while it is being read, which is no damage.
using DirectoryIdentity = std::optional<std::pair<std::uint64_t, std::uint64_t>>;
[[nodiscard]] DirectoryIdentity directory_identity(const std::filesystem::path& path);

}  // namespace strandline::cli
