// The header of a safetensors file: written for our shards, read from anybody's.
//
// File: 8 bytes little-endian header size N, N bytes of JSON (spaces may follow it), the data.
// docs/format.md describes what Strandline adds: the data begins at a multiple of 4096.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "strandline/dtype.h"
#include "strandline/error.h"

namespace strandline::format {

// What safetensors itself allows; a larger header is hostile or broken.
inline constexpr std::uint64_t kSafetensorsHeaderBytesMax = 100'000'000;

// The data section of our shards begins at a multiple of this, so that it can be written with
// direct I/O straight from staging memory.
inline constexpr std::uint64_t kDataAlignmentBytes = 4096;

struct ShardTensor {
  std::string name;
  DType dtype = DType::kU8;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;  // In the data section.
  std::uint64_t end = 0;
};

struct ShardHeader {
  std::vector<ShardTensor> tensors;  // In the order of their bytes.
  std::uint64_t data_start = 0;      // In the file.
};

// The first bytes of a file, up to its data: size, JSON with `__metadata__` {"format": "pt"}, and
// spaces up to kDataAlignmentBytes. REQUIRES: tensors in the order of their bytes, without gaps,
// with distinct names other than "__metadata__".
[[nodiscard]] std::string write_safetensors_header(std::span<const ShardTensor> tensors);

// How many bytes header and size prefix take, read from the first 8 bytes of a file. Fails with
// kCorrupt if they cannot be a header of a file of `file_bytes` bytes.
[[nodiscard]] Result<std::uint64_t> safetensors_data_start(std::span<const std::byte, 8> prefix,
                                                           std::uint64_t file_bytes);

// Parses everything before the data. `head` is exactly safetensors_data_start() bytes. Fails with
// kCorrupt on anything that the format forbids: JSON errors, duplicate, empty-free rules broken
// (gaps, overlaps, trailing bytes), sizes that do not fit dtype and shape, unknown dtypes, names
// with NUL. Pure, bounded, safe on any input.
[[nodiscard]] Result<ShardHeader> parse_safetensors_header(std::span<const std::byte> head,
                                                           std::uint64_t file_bytes);

}  // namespace strandline::format
