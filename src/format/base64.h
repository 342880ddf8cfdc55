// Bytes in JSON: base64 with the alphabet and padding of RFC 4648.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace strandline::format {

void append_base64(std::string& out, std::string_view bytes);

// Nothing if `text` is not exactly what append_base64 writes for some bytes.
[[nodiscard]] std::optional<std::string> from_base64(std::string_view text);

}  // namespace strandline::format
