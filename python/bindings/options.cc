#include "options.h"

#include <cmath>
#include <utility>

#include "collect.h"
#include "errors.h"
#include "objects.h"
#include "plain_values.h"

namespace strandline::python {
namespace {

[[noreturn]] void refuse(std::string message) {
  raise(Error{.code = ErrorCode::kInvalidArgument, .message = std::move(message)});
}

// The same with the exception that was caught as the cause. Signals pass as they are.
[[noreturn]] void refuse_because(nb::python_error& error, std::string message) {
  if (!error.matches(PyExc_Exception)) throw error;
  raise_from(Error{.code = ErrorCode::kInvalidArgument, .message = std::move(message)}, error);
}

}  // namespace

std::chrono::milliseconds milliseconds_of(double seconds) {
  if (std::isnan(seconds) || seconds < 0) {
    refuse("a time must be 0 seconds or more, not " + std::to_string(seconds));
  }
  // Far beyond any run, and safe to add to a clock.
  constexpr double kMillisecondsMax = 1e15;
  const double milliseconds = std::min(std::ceil(seconds * 1000), kMillisecondsMax);
  return std::chrono::milliseconds(static_cast<std::int64_t>(milliseconds));
}

std::filesystem::path path_of(nb::handle path) {
  PyObject* encoded = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), &encoded) == 0) throw nb::python_error();
  const nb::object held = nb::steal(encoded);
  return std::string(PyBytes_AS_STRING(encoded),
                     static_cast<std::size_t>(PyBytes_GET_SIZE(encoded)));
}

nb::object text_of_path(const std::string& path) {
  return checked(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

std::map<std::string, double> metrics_of(nb::handle metrics) {
  std::map<std::string, double> numbers;
  if (metrics.is_none()) return numbers;
  const nb::object items = checked(PyMapping_Items(metrics.ptr()));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(items.ptr()); ++i) {
    PyObject* pair = PyList_GET_ITEM(items.ptr(), i);
    PyObject* name = PyTuple_GET_ITEM(pair, 0);
    if (PyUnicode_Check(name) == 0) refuse("names of metrics must be str");
    const nb::object shown = checked(PyObject_ASCII(name));
    const std::string metric = "the metric " + std::string(utf8_of(shown.ptr()));
    std::string key;
    try {
      key = utf8_of(name);
    } catch (nb::python_error& error) {
      refuse_because(error, metric + " has a name with lone surrogates, which is no valid text");
    }
    PyObject* value = PyTuple_GET_ITEM(pair, 1);
    const double number = PyFloat_AsDouble(value);
    if (PyErr_Occurred() == nullptr) {
      numbers.emplace(std::move(key), number);
      continue;
    }
    nb::python_error error;
    refuse_because(error, metric + " must be a number that a float can hold, not " +
                              type_name(Py_TYPE(value)) +
                              "; its own error is the cause of this one");
  }
  return numbers;
}

std::variant<std::string, KeyPath> key_path_of(nb::handle key) {
  if (PyUnicode_Check(key.ptr()) != 0) return std::string(utf8_of(key.ptr()));
  if (PyTuple_Check(key.ptr()) == 0) {
    refuse("a key path must be a str such as 'model.weight' or a tuple of keys, not " +
           type_name(Py_TYPE(key.ptr())) + ": write (key,) for a key that is no str");
  }
  KeyPath path;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(key.ptr()); ++i) {
    auto part = key_of(PyTuple_GET_ITEM(key.ptr(), i));
    if (!part) {
      refuse("a key of type " + type_name(Py_TYPE(PyTuple_GET_ITEM(key.ptr(), i))) +
             " cannot occur in a checkpoint");
    }
    path.push_back(std::move(*part));
  }
  return path;
}

StateDict metadata_of(nb::handle metadata) {
  return metadata.is_none() ? StateDict() : collect_plain(metadata, "metadata");
}

}  // namespace strandline::python
