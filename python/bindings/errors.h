/// @file
/// The one place where an engine's Error becomes a Python exception.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <utility>

#include "strandline/error.h"

namespace strandline::python {

namespace nb = nanobind;

/// The exception of an error, its causes chained as `__cause__`. REQUIRES: the GIL.
nb::object exception_of(const Error& error);

/// Raises an error as its Python exception.
[[noreturn]] void raise(const Error& error);

/// Raises an error with the Python exception that is being handled as its `__cause__`.
[[noreturn]] void raise_from(const Error& error, nb::python_error& cause);

/// The value of a result, or its error raised.
template <typename T>
T unwrap(Result<T>&& result) {
  if (!result) raise(result.error());
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}

}  // namespace strandline::python
