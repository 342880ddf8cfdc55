// Streams the filled segments of a snapshot into the files of a partial directory.
#pragma once

#include <functional>
#include <vector>

#include "base/clock.h"
#include "staging/snapshot.h"
#include "strandline/checkpoint.h"
#include "strandline/storage.h"

namespace strandline::checkpoint {

// What the writer tells its owner.
struct WriteObserver {
  std::function<void(std::uint64_t bytes)>
      written;                    // Tensor bytes handed to the storage; headers do not count.
  std::function<Status()> check;  // An error stops the writing.
};

class ShardWriter {
 public:
  // Writes every file of the snapshot, in order, syncs each, and gives the memory of each segment
  // back as soon as it is written. Waits for segments that are still being staged, each until
  // `segment_wait` has passed. Returns the files as the manifest lists them. Blocks.
  // On failure files of the partial directory are in an unknown state: it must not be published.
  [[nodiscard]] static Result<std::vector<FileInfo>> run(staging::Snapshot& snapshot,
                                                         PartialDirectory& directory,
                                                         const base::Clock& clock,
                                                         std::chrono::milliseconds segment_wait,
                                                         const WriteObserver& observer);
};

}  // namespace strandline::checkpoint
