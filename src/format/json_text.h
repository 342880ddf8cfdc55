// Writing JSON: the few pieces that the formats are put together from. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace strandline::format {

// Whether text may stand in JSON at all.
[[nodiscard]] bool is_valid_utf8(std::string_view text);

// Appends text as a JSON string, quotes included. Control characters, NUL among them, become
// \u00XX; everything else beyond '"' and '\' stands as it is. REQUIRES: is_valid_utf8(text).
void append_json_string(std::string& out, std::string_view text);

void append_json_integer(std::string& out, std::int64_t number);
void append_json_unsigned(std::string& out, std::uint64_t number);

// Appends the shortest digits that read back as the same double, always with a '.' or an exponent,
// so that a reader can tell 1.0 from 1 and -0.0 stays. REQUIRES: a finite number.
void append_json_double(std::string& out, double number);

}  // namespace strandline::format
