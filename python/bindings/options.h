/// @file
/// Arguments of Python calls as the engine takes them.
#pragma once

#include <nanobind/nanobind.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <string>
#include <variant>

#include "strandline/checkpointer.h"

namespace strandline::python {

namespace nb = nanobind;

/// Seconds as milliseconds, rounded up; raises InvalidArgumentError for NaN and negative numbers.
std::chrono::milliseconds milliseconds_of(double seconds);

/// A str, bytes or os.PathLike as a path, byte for byte.
std::filesystem::path path_of(nb::handle path);

/// A path as a str, as os.fsdecode gives it.
nb::object text_of_path(const std::string& path);

/// A dict of name to number; anything with `__float__` is a number.
std::map<std::string, double> metrics_of(nb::handle metrics);

/// A key path as text, or as a tuple of keys.
std::variant<std::string, KeyPath> key_path_of(nb::handle key);

/// The metadata argument of save(): None or a dict of plain values.
StateDict metadata_of(nb::handle metadata);

}  // namespace strandline::python
