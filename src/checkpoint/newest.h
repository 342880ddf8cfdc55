// Finds the newest step that can be used, and says what was wrong with newer ones.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "strandline/checkpoint.h"
#include "strandline/storage.h"

namespace strandline::checkpoint {

// Opens `step`, or steps from the newest to the oldest, and calls `use` with each until one
// succeeds; that one is returned. A step that is damaged, or that the device cannot read, is passed
// over, and `warnings` says so. Returns nothing if there is no step at all. Fails with
//   kNotFound      `step` is not there: lists those that are;
//   kUnsupported   a newer step was written by a newer version: passing it over would lose work;
//   kCorrupt       no step is good: lists each cause;
//   kIo            a step cannot be read for want of rights, descriptors or memory;
//   what `use` failed with, where that was no damage.
// Where files vanish because another process prunes, it starts again from the newest.
[[nodiscard]] Result<std::optional<Checkpoint>> use_newest(
    Storage& storage, std::optional<std::int64_t> step,
    const std::function<Status(const Checkpoint&)>& use, std::vector<std::string>& warnings);

}  // namespace strandline::checkpoint
