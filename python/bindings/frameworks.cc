#include "frameworks.h"

#include <utility>

#include "objects.h"

namespace strandline::python {
namespace {

struct NamedType {
  DType dtype;
  const char* name;
};

// PyTorch's names. F4 elements come in pairs; F6 types do not exist there.
constexpr NamedType kTorchNames[] = {
    {DType::kBool, "bool"},
    {DType::kF4, "float4_e2m1fn_x2"},
    {DType::kU8, "uint8"},
    {DType::kI8, "int8"},
    {DType::kF8E5M2, "float8_e5m2"},
    {DType::kF8E4M3, "float8_e4m3fn"},
    {DType::kF8E8M0, "float8_e8m0fnu"},
    {DType::kF8E4M3FNUZ, "float8_e4m3fnuz"},
    {DType::kF8E5M2FNUZ, "float8_e5m2fnuz"},
    {DType::kI16, "int16"},
    {DType::kU16, "uint16"},
    {DType::kF16, "float16"},
    {DType::kBF16, "bfloat16"},
    {DType::kI32, "int32"},
    {DType::kU32, "uint32"},
    {DType::kF32, "float32"},
    {DType::kC64, "complex64"},
    {DType::kF64, "float64"},
    {DType::kI64, "int64"},
    {DType::kU64, "uint64"},
};

constexpr NamedType kNumpyNames[] = {
    {DType::kBool, "bool"},     {DType::kU8, "uint8"},    {DType::kI8, "int8"},
    {DType::kI16, "int16"},     {DType::kU16, "uint16"},  {DType::kF16, "float16"},
    {DType::kI32, "int32"},     {DType::kU32, "uint32"},  {DType::kF32, "float32"},
    {DType::kC64, "complex64"}, {DType::kF64, "float64"}, {DType::kI64, "int64"},
    {DType::kU64, "uint64"},
};

// ml_dtypes stores F4 and F6 one element a byte, which is not how they are saved.
constexpr NamedType kMlNames[] = {
    {DType::kBF16, "bfloat16"},
    {DType::kF8E5M2, "float8_e5m2"},
    {DType::kF8E4M3, "float8_e4m3fn"},
    {DType::kF8E8M0, "float8_e8m0fnu"},
    {DType::kF8E4M3FNUZ, "float8_e4m3fnuz"},
    {DType::kF8E5M2FNUZ, "float8_e5m2fnuz"},
};

// A module that has been imported under this name, or null. A module still being imported lacks
// `probe` and counts as absent.
nb::object imported_module(const char* name, const char* probe) {
  PyObject* modules = PyImport_GetModuleDict();
  PyObject* module = PyDict_GetItemString(modules, name);
  if (module == nullptr || module == Py_None || PyObject_HasAttrString(module, probe) == 0) {
    return {};
  }
  return nb::borrow(module);
}

// Imports a module; null if it, or what it needs, is not installed.
nb::object installed_module(const char* name) {
  PyObject* module = PyImport_ImportModule(name);
  if (module == nullptr) {
    if (PyErr_ExceptionMatches(PyExc_ModuleNotFoundError) == 0) throw nb::python_error();
    PyErr_Clear();
    return {};
  }
  return nb::steal(module);
}

PyTypeObject* type_attribute(const nb::object& module, const char* name) {
  return reinterpret_cast<PyTypeObject*>(nb::getattr(module, name).release().ptr());
}

const Numpy* numpy_of(nb::object module) {
  static const Numpy* known = nullptr;
  if (known == nullptr && module.is_valid()) {
    auto* numpy = new Numpy;  // Lives as long as the process: so do the types that it names.
    numpy->ndarray = type_attribute(module, "ndarray");
    numpy->generic = type_attribute(module, "generic");
    numpy->module = module.release().ptr();
    known = numpy;
  }
  return known;
}

const Torch* torch_of(nb::object module) {
  static const Torch* known = nullptr;
  if (known == nullptr && module.is_valid()) {
    auto* torch = new Torch;  // As above.
    torch->tensor = type_attribute(module, "Tensor");
    torch->parameter = type_attribute(module.attr("nn"), "Parameter");
    torch->size = type_attribute(module, "Size");
    torch->dtype_type = type_attribute(module, "dtype");
    torch->device = type_attribute(module, "device");
    torch->strided = nb::getattr(module, "strided").release().ptr();
    for (const NamedType& type : kTorchNames) {
      nb::object dtype = nb::getattr(module, type.name, nb::object());
      torch->dtypes[static_cast<std::size_t>(type.dtype)] = dtype.release().ptr();
    }
    torch->dltensor = dltensor_function(torch->tensor);
    torch->module = module.release().ptr();
    known = torch;
  }
  return known;
}

}  // namespace

const Numpy* Numpy::if_imported() {
  if (const Numpy* known = numpy_of({})) return known;
  return numpy_of(imported_module("numpy", "generic"));
}

const Numpy* Numpy::import_if_installed() {
  if (const Numpy* known = numpy_of({})) return known;
  return numpy_of(installed_module("numpy"));
}

nb::object Numpy::dtype(DType dtype) const {
  for (const NamedType& type : kNumpyNames) {
    if (type.dtype == dtype) return nb::handle(module).attr("dtype")(type.name);
  }
  for (const NamedType& type : kMlNames) {
    if (type.dtype != dtype) continue;
    const nb::object ml_dtypes = installed_module("ml_dtypes");
    if (!ml_dtypes.is_valid() || !nb::hasattr(ml_dtypes, type.name)) return {};
    return nb::handle(module).attr("dtype")(ml_dtypes.attr(type.name));
  }
  return {};
}

const Torch* Torch::if_imported() {
  if (const Torch* known = torch_of({})) return known;
  return torch_of(imported_module("torch", "nn"));
}

const Torch* Torch::import_if_installed() {
  if (const Torch* known = torch_of({})) return known;
  const nb::object adapter = installed_module("strandline.torch");
  return adapter.is_valid() ? torch_of(imported_module("torch", "nn")) : nullptr;
}

std::optional<DType> Torch::element_type(PyObject* dtype) const {
  for (std::uint8_t i = 0; i < kDTypeCount; ++i) {
    if (dtypes[i] == dtype) return static_cast<DType>(i);
  }
  return std::nullopt;
}

std::optional<DType> ml_dtype_from_name(std::string_view name) {
  for (const NamedType& type : kMlNames) {
    if (name == type.name) return type.dtype;
  }
  return std::nullopt;
}

}  // namespace strandline::python
