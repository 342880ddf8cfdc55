// Plain values in JSON, exactly: what JSON has stands bare, everything else is an object with one
// member that names its type. docs/format.md has the table.
#pragma once

#include <cstdint>
#include <string>

#include "format/json_reader.h"
#include "strandline/error.h"
#include "strandline/value.h"

namespace strandline::format {

// Lists and tagged values inside one plain value nest at most this deep. Adapters need three; with
// kStateDepthMax containers around, it stays within kManifestJsonDepthMax.
inline constexpr std::uint32_t kValueDepthMax = 16;

// Appends a value. Fails with kUnsupported on text that is not UTF-8, on a BigInteger that is not
// decimal, and on nesting beyond kValueDepthMax; the message says which and `out` is then useless.
[[nodiscard]] Status append_value(std::string& out, const Value& value);

// Reads what append_value wrote. Fails with kCorrupt on anything else.
[[nodiscard]] Result<Value> read_value(const JsonNode& node);

// A double, bare or by its bits; and back. Integers are read as doubles too.
void append_number(std::string& out, double number);
[[nodiscard]] Result<double> read_number(const JsonNode& node);

}  // namespace strandline::format
