/// @file
/// Plain values at the border: Python objects without tensors in them, both ways and exactly.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <string>

#include "strandline/value.h"

namespace strandline::python {

namespace nb = nanobind;

/// The value of an object of a plain type (None, bool, int, float, str, bytes, and those that are
/// kept as Value::Tagged); nothing if its type is another one. Only exact types count: a subclass
/// would come back as something else. REQUIRES: the GIL.
std::optional<Value> value_of(PyObject* object);

/// The key of a dict; nothing if it is not None, bool, int, float, str without lone surrogates, or
/// bytes.
std::optional<Key> key_of(PyObject* key);

/// An object as a pickle.
Value pickle_of(PyObject* object);

/// The object of a value; `key_path` is where it stands, for errors. Raises UnsupportedError for a
/// pickle unless `allow_pickle`, and for a tag that this version does not know.
nb::object object_of(const Value& value, bool allow_pickle, const std::string& key_path);

}  // namespace strandline::python
