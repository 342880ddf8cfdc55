// Reads a storage: which steps are committed, which is newest, how they descend from each other.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "strandline/checkpoint.h"
#include "strandline/storage.h"

namespace strandline::checkpoint {

class Catalog {
 public:
  // Reads every step's manifest. A step that was moved aside while it was being replaced counts
  // where the step itself is absent. Unreadable steps come first, then by sequence. Fails with kIo
  // where steps vanish again and again while they are read. Blocks.
  [[nodiscard]] static Result<Catalog> read(Storage& storage);

  // Unreadable ones first, then oldest commit first.
  [[nodiscard]] const std::vector<StepEntry>& entries() const { return entries_; }

  // The entry of a step; null if there is none.
  [[nodiscard]] const StepEntry* find(std::int64_t step) const;
  [[nodiscard]] const StepEntry* find_sequence(std::uint64_t sequence) const;

  // 0 without a readable step.
  [[nodiscard]] std::uint64_t highest_sequence() const;

  // Whether `sequence` may be an ancestor of `descendant`, or is it. Where the chain of parents is
  // broken because an ancestor was pruned, everything older counts as an ancestor: what cannot be
  // proven abandoned is not given up.
  [[nodiscard]] bool is_ancestor(std::uint64_t sequence, std::uint64_t descendant) const;

 private:
  // `vanished` gets the names of what was listed but not there, or had no manifest.
  [[nodiscard]] static Result<Catalog> read_once(Storage& storage, std::set<std::string>& vanished);

  std::vector<StepEntry> entries_;
};

// Reads only the manifest of an open step. `info.bytes` is the sum of all its files.
[[nodiscard]] Result<CheckpointInfo> read_info(ReadableDirectory& directory);

// Tells people what to do about a damaged step that they asked for; leaves other errors alone.
[[nodiscard]] Error with_remedy(Error error);

// What to say where steps vanish again and again while they are read.
[[nodiscard]] Error steps_keep_vanishing(const Storage& storage);

}  // namespace strandline::checkpoint
