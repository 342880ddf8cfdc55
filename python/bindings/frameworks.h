/// @file
/// What the bindings know of NumPy and PyTorch. Both are met as Python modules; nothing of them is
/// linked, and collecting never imports them: an object of theirs proves that they are imported.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <optional>
#include <string_view>

#include "dlpack.h"
#include "strandline/dtype.h"

namespace strandline::python {

namespace nb = nanobind;

/// The types and functions of NumPy that are used. Made once and never freed. REQUIRES: the GIL.
struct Numpy {
  PyTypeObject* ndarray = nullptr;
  PyTypeObject* generic = nullptr;
  PyObject* module = nullptr;

  /// NumPy if somebody has imported it, else null.
  static const Numpy* if_imported();
  /// NumPy, imported if necessary; null if it is not installed.
  static const Numpy* import_if_installed();

  /// The dtype object of an element type, from NumPy or ml_dtypes; null if neither has it.
  [[nodiscard]] nb::object dtype(DType dtype) const;
};

/// The types and functions of PyTorch that are used. Made once and never freed. REQUIRES: the GIL.
struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyTypeObject* size = nullptr;
  PyTypeObject* dtype_type = nullptr;
  PyTypeObject* device = nullptr;
  PyObject* strided = nullptr;  ///< The layout of ordinary tensors.
  PyObject* module = nullptr;
  DLTensorFromObject dltensor = nullptr;        ///< Null where this PyTorch publishes none.
  std::array<PyObject*, kDTypeCount> dtypes{};  ///< By DType; null where torch has none.

  static const Torch* if_imported();
  /// PyTorch through strandline.torch, the one package that imports it; null if not installed.
  static const Torch* import_if_installed();

  [[nodiscard]] std::optional<DType> element_type(PyObject* dtype) const;
};

/// The element type of an ml_dtypes dtype by its name, such as "bfloat16".
std::optional<DType> ml_dtype_from_name(std::string_view name);

}  // namespace strandline::python
