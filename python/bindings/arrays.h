/// @file
/// Tensors and arrays at the border: the view of an existing one, and new ones for what is loaded.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>
#include <vector>

#include "frameworks.h"
#include "strandline/state_dict.h"

namespace strandline::python {

namespace nb = nanobind;

/// What the type of an object says about it.
enum class ArrayKind : std::uint8_t {
  kNone,           ///< Neither a tensor nor an array.
  kTorch,          ///< Exactly torch.Tensor or torch.nn.Parameter.
  kTorchSubclass,  ///< Another subclass of torch.Tensor.
  kNumpy,          ///< Exactly numpy.ndarray.
  kNumpySubclass,
};
ArrayKind array_kind(PyObject* object);

/// The view of a tensor or array of kind kTorch or kNumpy. It borrows from `memory`, which the
/// caller keeps: the object alone may get other memory meanwhile (`tensor.data = …`). Fails with
/// kUnsupported, without a key path; raises what reading the object's attributes raises.
Result<TensorView> view_of(PyObject* object, ArrayKind kind, nb::object& memory);

/// The bytes of a strided torch.Tensor or Parameter of any element type, as a view of kU8 whose
/// innermost dimension is the bytes of one element; conjugate and negative bits are not looked at.
/// It borrows from `memory`, as view_of() does. Fails with kUnsupported for tensors that are no
/// plain memory, without a key path; raises what reading the object's attributes raises.
Result<TensorView> bytes_view_of(PyObject* tensor, nb::object& memory);

/// A new, uninitialised, row-major tensor or array.
struct NewArray {
  nb::object object;
  TensorView view;
};

/// Makes a tensor where `framework` is "torch" and PyTorch is installed, else an array. Fails with
/// kUnsupported where neither has the element type.
Result<NewArray> make_array(const std::string& framework, DType dtype,
                            const std::vector<std::uint64_t>& shape);

/// A tensor or array over a part of the memory of one made by make_array(), sharing it; a copy
/// where the part is not aligned for its element type.
nb::object make_alias(const NewArray& owner, const TensorView& part, const std::string& framework);

}  // namespace strandline::python
