// Errors at the border. The classes are written in Python (strandline/errors.py), where they read
// and type-check best; this file knows which class belongs to which code.

#include "errors.h"

namespace strandline::python {
namespace {

const char* class_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "InvalidArgumentError";
    case ErrorCode::kUnsupported:
      return "UnsupportedError";
    case ErrorCode::kNotFound:
      return "NotFoundError";
    case ErrorCode::kAlreadyExists:
      return "AlreadyExistsError";
    case ErrorCode::kMismatch:
      return "MismatchError";
    case ErrorCode::kCorrupt:
      return "CorruptError";
    case ErrorCode::kIo:
      return "IoError";
    case ErrorCode::kMemoryLimit:
      return "MemoryLimitError";
    case ErrorCode::kTimeout:
      return "TimeoutError";
    case ErrorCode::kUnavailable:
      return "UnavailableError";
  }
  return "Error";
}

// Text of the engine as a str. Paths may hold any bytes; those that are not UTF-8 become surrogates
// as in os.fsdecode.
nb::object text_of(const std::string& text) {
  return nb::steal(
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogateescape"));
}

nb::object text_or_none(const std::string& text) {
  return text.empty() ? nb::none() : text_of(text);
}

}  // namespace

nb::object exception_of(const Error& error) {
  Error alone = error;
  alone.cause = nullptr;  // Python shows causes by itself.
  const nb::object type = nb::module_::import_("strandline.errors").attr(class_name(error.code));
  nb::object system_errno = nb::none();
  if (error.system_errno != 0) system_errno = nb::int_(error.system_errno);
  nb::object exception =
      type(text_of(alone.text()), nb::arg("key_path") = text_or_none(error.key_path),
           nb::arg("path") = text_or_none(error.path), nb::arg("errno") = system_errno);
  if (error.cause != nullptr) {
    PyException_SetCause(exception.ptr(), exception_of(*error.cause).release().ptr());
  }
  return exception;
}

void raise(const Error& error) {
  const nb::object exception = exception_of(error);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
  throw nb::python_error();
}

void raise_from(const Error& error, nb::python_error& cause) {
  const nb::object exception = exception_of(error);
  PyException_SetCause(exception.ptr(), nb::borrow(cause.value()).release().ptr());
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
  throw nb::python_error();
}

}  // namespace strandline::python
