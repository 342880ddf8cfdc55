/// @file
/// The version of the library and of what it writes.
#pragma once

#include <cstdint>

namespace strandline::inline v0 {

/// The library's version, `major.minor.patch`; CMake and the Python package read it from here.
inline constexpr const char* kVersion = "0.1.0";

/// The version of the files that this library writes. A reader refuses a higher major version and
/// ignores members it does not know within the same one.
inline constexpr std::uint32_t kFormatMajor = 1;
inline constexpr std::uint32_t kFormatMinor = 0;

}  // namespace strandline::inline v0
