// Reads whole small files of a step: its manifest, and others within a limit.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "format/manifest.h"
#include "strandline/storage.h"

namespace strandline::checkpoint {

// Reads a whole file of at most `bytes_max` bytes. A larger one is kCorrupt.
[[nodiscard]] Result<std::string> read_whole_file(ReadableDirectory& directory,
                                                  std::string_view name, std::uint64_t bytes_max);

// Reads and parses the manifest; errors name the file. Fills `info.bytes`.
[[nodiscard]] Result<format::Manifest> read_manifest(ReadableDirectory& directory);

// Those of `names` that a step with this manifest does not have: somebody put them beside its
// files.
[[nodiscard]] std::vector<std::string> files_beside(const CheckpointInfo& info,
                                                    const std::vector<std::string>& names);

// Adds the path of a file to an error that has none.
[[nodiscard]] Error at_file(Error error, const ReadableDirectory& directory, std::string_view name);

}  // namespace strandline::checkpoint
