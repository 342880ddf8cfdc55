/// @file
/// Small helpers over the C API of CPython.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <string_view>

namespace strandline::python {

namespace nb = nanobind;

/// Takes over a new reference; raises the pending exception where there is none.
inline nb::object checked(PyObject* made) {
  if (made == nullptr) throw nb::python_error();
  return nb::steal(made);
}

/// Raises the pending exception of a C call that reports failure as -1.
inline void checked_status(int status) {
  if (status < 0) throw nb::python_error();
}

/// A str that is made once and found by its address afterwards. REQUIRES: a static lifetime, as of
/// a function's static variable: it is never freed.
class Name {
 public:
  explicit Name(const char* text) : text_(PyUnicode_InternFromString(text)) {
    if (text_ == nullptr) throw nb::python_error();
  }
  [[nodiscard]] PyObject* get() const { return text_; }

 private:
  PyObject* text_;
};

inline nb::object attribute(PyObject* object, const Name& name) {
  return checked(PyObject_GetAttr(object, name.get()));
}

inline nb::object call_method(PyObject* object, const Name& name) {
  return checked(PyObject_CallMethodNoArgs(object, name.get()));
}

inline bool is_true(const nb::object& object) {
  const int truth = PyObject_IsTrue(object.ptr());
  checked_status(truth);
  return truth != 0;
}

inline std::uint64_t unsigned_of(PyObject* number) {
  const unsigned long long value = PyLong_AsUnsignedLongLong(number);
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  return value;
}

inline std::int64_t signed_of(PyObject* number) {
  const long long value = PyLong_AsLongLong(number);
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  return value;
}

/// The UTF-8 of a str, which lives as long as the str. REQUIRES: a str without lone surrogates.
inline std::string_view utf8_of(PyObject* text) {
  Py_ssize_t bytes = 0;
  const char* data = PyUnicode_AsUTF8AndSize(text, &bytes);
  if (data == nullptr) throw nb::python_error();
  return {data, static_cast<std::size_t>(bytes)};
}

/// `module.Name` of a type, for messages.
inline std::string type_name(PyTypeObject* type) {
  const nb::handle handle(reinterpret_cast<PyObject*>(type));
  const std::string module(nb::str(nb::getattr(handle, "__module__", nb::str(""))).c_str());
  const std::string name(nb::str(handle.attr("__qualname__")).c_str());
  return module.empty() || module == "builtins" ? name : module + "." + name;
}

}  // namespace strandline::python
