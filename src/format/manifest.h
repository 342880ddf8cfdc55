// The manifest of a step, version 1: the truth about what the step holds.
//
// docs/format.md describes the JSON member by member. Pure: no I/O.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "strandline/checkpoint.h"
#include "strandline/error.h"
#include "strandline/state_dict.h"

namespace strandline::format {

inline constexpr std::string_view kManifestName = "manifest.json";

// Half a million tensors fit; a larger file is not one of ours, and none larger is written.
inline constexpr std::uint64_t kManifestBytesMax = 64ull << 20;

// Nesting of JSON containers: a tree of kStateDepthMax levels takes three JSON levels each, which
// leaves sixty for a plain value in it.
inline constexpr std::uint32_t kManifestJsonDepthMax = 256;

// One piece of a tensor in one shard: `shape` elements at `offset`.
struct TensorPart {
  std::string file;
  std::string name;
  std::vector<std::uint64_t> offset;
  std::vector<std::uint64_t> shape;
};

// A leaf whose bytes are those of another tensor, from offset_bytes on.
struct TensorAlias {
  std::uint32_t tensor = 0;  // Index among the tensors; never itself an alias.
  std::uint64_t offset_bytes = 0;
};

// Where a tensor of the tree is: parts or an alias, exactly one of them.
struct TensorEntry {
  std::vector<TensorPart> parts;
  std::optional<TensorAlias> alias;
};

struct Manifest {
  CheckpointInfo info;               // `bytes` is not in the file: the reader fills it in.
  StateDict tree;                    // The views have no memory; shapes and dtypes are set.
  std::vector<TensorEntry> entries;  // One per tensor of the tree.
};

// The file's content, digest included; info.bytes and the format version in it are not looked at.
// Fails with kUnsupported, naming the key path where there is one, on what would give a manifest
// that nobody can read: text that is not UTF-8, plain values nested beyond kValueDepthMax, tensors
// in the metadata, more than kManifestBytesMax in all. REQUIRES: otherwise what parse_manifest
// checks.
[[nodiscard]] Result<std::string> write_manifest(const Manifest& manifest);

// Checks the digest, then parses. Fails with kCorrupt (damaged, hostile, or not a manifest) or
// kUnsupported (a newer major version or an unknown requirement). Also checked: file names match
// [A-Za-z0-9._~-]+ without a leading dot, names are distinct, parts name listed files, every
// tensor has one part with its whole shape or an alias that lies inside its target, no size
// overflows. Pure, bounded, safe on any input.
[[nodiscard]] Result<Manifest> parse_manifest(std::string_view text);

}  // namespace strandline::format
