// The one place where an errno becomes an Error.
#pragma once

#include <string>
#include <string_view>

#include "strandline/error.h"

namespace strandline::base {

// "cannot <operation> <path>: <reason of the system>: <likely remedy>", with code, path and errno
// set. ENOENT gives kNotFound, EEXIST kAlreadyExists, everything else kIo.
[[nodiscard]] Error system_error(std::string_view operation, std::string_view path, int error);

}  // namespace strandline::base
