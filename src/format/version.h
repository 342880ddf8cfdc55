// The version of the formats that manifest and rank file share, and its JSON.
#pragma once

#include <cstdint>
#include <string>

#include "format/json_reader.h"
#include "strandline/error.h"

namespace strandline::format {

// A higher major version is refused. A higher minor version only adds members that an older reader
// may ignore; what it may not ignore is named in `requires`.
inline constexpr std::uint32_t kFormatMajor = 1;
inline constexpr std::uint32_t kFormatMinor = 0;

struct FormatVersion {
  std::uint32_t major = 0;
  std::uint32_t minor = 0;
};

// Appends the member "format" of this version.
void append_format(std::string& out);

// Reads the member `format` of `root`. Fails with kUnsupported, naming what is missing, if this
// version cannot read the file.
[[nodiscard]] Result<FormatVersion> read_format(const JsonObject& root);

// An unsigned integer that must fit into 32 bits.
[[nodiscard]] Result<std::uint32_t> read_uint32(const JsonNode& node);

}  // namespace strandline::format
