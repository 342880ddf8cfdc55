// Tensors and arrays at the border.
//
// Problem: the engine wants an address, an element type, a shape and strides, and where the memory
// around them begins and ends, of thousands of tensors, between two training steps.
//
// Approach: attributes are read through CPython's C API with names made once. PyTorch additionally
// publishes C functions that fill a DLTensor without running Python (DLPack 1.2's exchange API,
// `torch.Tensor.__dlpack_c_exchange_api__`); where they are there, type, shape, strides and device
// come from them. Three things DLPack does not tell are always read as attributes: whether the
// tensor is a conjugate or negative view (its address is the original's: copying it would save
// wrong numbers), whether its layout is plain memory, and its storage, without which a tensor whose
// memory was freed or resized looks sound.
//
// NumPy publishes `__array_struct__`, a C struct. It knows machine types only; the element types of
// ml_dtypes appear in it as opaque records and are told apart by name.
//
// Rejected: linking libtorch (one build a version); the `torch.Tensor` buffer protocol (there is
// none); `__dlpack__()` (makes an owning capsule each time, refuses tensors that require
// gradients).

#include "arrays.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "objects.h"

namespace strandline::python {
namespace {

constexpr const char* kTorchFramework = "torch";
constexpr const char* kNumpyFramework = "numpy";

tl::unexpected<Error> unsupported(std::string message) {
  return failure(ErrorCode::kUnsupported, std::move(message));
}

// ---- PyTorch ----

std::string text_of(PyObject* object) {
  return std::string(utf8_of(checked(PyObject_Str(object)).ptr()));
}

// The names of the attributes that are read of every tensor.
struct TorchNames {
  Name layout{"layout"};
  Name dtype{"dtype"};
  Name is_nested{"is_nested"};
  Name is_cpu{"is_cpu"};
  Name device{"device"};
  Name shape{"shape"};
  Name stride{"stride"};
  Name data_ptr{"data_ptr"};
  Name element_size{"element_size"};
  Name untyped_storage{"untyped_storage"};
  Name nbytes{"nbytes"};
  Name is_conj{"is_conj"};
  Name is_neg{"is_neg"};
};

const TorchNames& torch_names() {
  static const TorchNames kNames;
  return kNames;
}

std::byte* address_of(const nb::object& number) {
  return reinterpret_cast<std::byte*>(unsigned_of(number.ptr()));
}

Result<DeviceId> device_of(PyObject* tensor) {
  DeviceId id;
  const TorchNames& names = torch_names();
  if (is_true(attribute(tensor, names.is_cpu))) return id;
  const nb::object device = attribute(tensor, names.device);
  const nb::object type = device.attr("type");
  id.kind = utf8_of(type.ptr());
  if (id.kind == "meta") {
    return unsupported(
        "is a meta tensor, which has no values: move it to a device with to_empty() and fill it, "
        "or remove it");
  }
  const nb::object index = device.attr("index");
  if (!index.is_none()) id.index = nb::cast<int>(index);
  return id;
}

tl::unexpected<Error> unsupported_torch_type(const std::string& name) {
  if (name == "torch.complex128") {
    return unsupported(
        "has the type torch.complex128, which safetensors does not know: save "
        "torch.view_as_real(tensor)");
  }
  if (name.starts_with("torch.q")) {
    return unsupported("is a quantized tensor (" + name +
                       "): save its int_repr(), scales and zero points");
  }
  return unsupported("has the type " + name +
                     ", which safetensors does not know: convert it, or save tensor.view() of it "
                     "as another type");
}

// The bytes of what PyTorch counts as one element; a pair of F4 is one.
std::int64_t item_bytes(DType dtype) { return std::max<std::int64_t>(dtype_bits(dtype) / 8, 1); }

// Shape and strides as PyTorch gives them, for elements of `bytes_each`.
void read_geometry(PyObject* tensor, std::int64_t bytes_each, TensorView& view) {
  const TorchNames& names = torch_names();
  const nb::object shape = attribute(tensor, names.shape);
  const nb::object strides = call_method(tensor, names.stride);
  const Py_ssize_t dimensions = PyTuple_Size(shape.ptr());
  if (dimensions < 0 || PyTuple_Size(strides.ptr()) != dimensions) throw nb::python_error();
  view.shape.reserve(static_cast<std::size_t>(dimensions));
  view.strides_bytes.reserve(static_cast<std::size_t>(dimensions));
  for (Py_ssize_t i = 0; i < dimensions; ++i) {
    view.shape.push_back(unsigned_of(PyTuple_GET_ITEM(shape.ptr(), i)));
    view.strides_bytes.push_back(signed_of(PyTuple_GET_ITEM(strides.ptr(), i)) * bytes_each);
  }
}

// PyTorch keeps two F4 elements in one; safetensors counts each, in the last dimension.
Status split_pairs(TensorView& view) {
  if (view.shape.empty()) {
    return unsupported("is a 0-d tensor of torch.float4_e2m1fn_x2: save tensor.reshape(1)");
  }
  TensorView bytes = view;
  bytes.dtype = DType::kU8;
  if (!bytes.is_row_major()) {
    return unsupported(
        "is a torch.float4_e2m1fn_x2 tensor that is not contiguous: save "
        "tensor.contiguous()");
  }
  view.shape.back() *= 2;
  view.strides_bytes = TensorView::row_major(nullptr, DType::kF4, view.shape).strides_bytes;
  return {};
}

// `memory` becomes the storage: the tensor may get another one while its bytes are copied.
void read_storage(PyObject* tensor, TensorView& view, nb::object& memory) {
  const TorchNames& names = torch_names();
  nb::object storage = call_method(tensor, names.untyped_storage);
  view.storage_base = address_of(call_method(storage.ptr(), names.data_ptr));
  view.storage_bytes = unsigned_of(call_method(storage.ptr(), names.nbytes).ptr());
  memory = std::move(storage);
}

// What DLPack tells of a plain tensor in host memory. Nothing of any other one, which the
// attributes then explain.
std::optional<DLTensor> host_dltensor(const Torch& torch, PyObject* tensor) {
  if (torch.dltensor == nullptr) return std::nullopt;
  DLTensor filled{};
  if (torch.dltensor(tensor, &filled) != 0) {
    PyErr_Clear();
    return std::nullopt;
  }
  if (filled.device.type != kDLCpu) return std::nullopt;
  return filled;
}

std::optional<TensorView> view_by_dlpack(const Torch& torch, PyObject* tensor) {
  const std::optional<DLTensor> found = host_dltensor(torch, tensor);
  if (!found) return std::nullopt;
  const DLTensor& filled = *found;
  const std::optional<DType> dtype = dtype_of(filled.dtype);
  if (!dtype) return std::nullopt;
  const auto dimensions = static_cast<std::size_t>(filled.dimensions);
  TensorView view;
  view.dtype = *dtype;
  view.data = static_cast<std::byte*>(filled.data) + filled.byte_offset;
  view.shape.assign(filled.shape, filled.shape + dimensions);
  view.strides_bytes.assign(filled.strides, filled.strides + dimensions);
  for (std::int64_t& stride : view.strides_bytes) stride *= item_bytes(view.dtype);
  return view;
}

Status check_is_plain_memory(const Torch& torch, PyObject* tensor) {
  const TorchNames& names = torch_names();
  const nb::object layout = attribute(tensor, names.layout);
  if (layout.ptr() != torch.strided) {
    return unsupported("is a sparse tensor or one of another special layout (" +
                       text_of(layout.ptr()) +
                       "): save tensor.to_dense(), or its indices and values");
  }
  if (is_true(attribute(tensor, names.is_nested))) {
    return unsupported("is a nested tensor: save the list tensor.unbind()");
  }
  return {};
}

Result<TensorView> view_by_attributes(const Torch& torch, PyObject* tensor) {
  const TorchNames& names = torch_names();
  if (Status plain = check_is_plain_memory(torch, tensor); !plain) {
    return failure(std::move(plain.error()));
  }
  TensorView view;
  const nb::object dtype = attribute(tensor, names.dtype);
  const std::optional<DType> known = torch.element_type(dtype.ptr());
  if (!known) return unsupported_torch_type(text_of(dtype.ptr()));
  view.dtype = *known;
  Result<DeviceId> device = device_of(tensor);
  if (!device) return failure(std::move(device.error()));
  view.device = std::move(*device);
  read_geometry(tensor, item_bytes(view.dtype), view);
  view.data = address_of(call_method(tensor, names.data_ptr));
  return view;
}

Result<TensorView> read_torch(const Torch& torch, PyObject* tensor, nb::object& memory) {
  const TorchNames& names = torch_names();
  TensorView view;
  if (auto plain = view_by_dlpack(torch, tensor)) {
    view = std::move(*plain);
  } else {
    Result<TensorView> explained = view_by_attributes(torch, tensor);
    if (!explained) return explained;
    view = std::move(*explained);
  }
  if (view.dtype == DType::kF4) {
    if (Status split = split_pairs(view); !split) return failure(std::move(split.error()));
  }
  read_storage(tensor, view, memory);
  if (view.dtype == DType::kC64) view.conjugate = is_true(call_method(tensor, names.is_conj));
  view.negative = is_true(call_method(tensor, names.is_neg));
  view.writable = true;
  view.framework = kTorchFramework;
  return view;
}

Result<TensorView> read_torch_bytes(const Torch& torch, PyObject* tensor, nb::object& memory) {
  const TorchNames& names = torch_names();
  TensorView view;
  std::int64_t bytes_each = 0;
  if (const auto plain = host_dltensor(torch, tensor)) {
    const auto dimensions = static_cast<std::size_t>(plain->dimensions);
    bytes_each = plain->dtype.bits * plain->dtype.lanes / 8;
    view.data = static_cast<std::byte*>(plain->data) + plain->byte_offset;
    view.shape.assign(plain->shape, plain->shape + dimensions);
    view.strides_bytes.assign(plain->strides, plain->strides + dimensions);
    for (std::int64_t& stride : view.strides_bytes) stride *= bytes_each;
  } else {
    if (Status plain_memory = check_is_plain_memory(torch, tensor); !plain_memory) {
      return failure(std::move(plain_memory.error()));
    }
    const std::string dtype = text_of(attribute(tensor, names.dtype).ptr());
    if (dtype.starts_with("torch.q")) return unsupported_torch_type(dtype);
    Result<DeviceId> device = device_of(tensor);
    if (!device) return failure(std::move(device.error()));
    view.device = std::move(*device);
    bytes_each = signed_of(call_method(tensor, names.element_size).ptr());
    read_geometry(tensor, bytes_each, view);
    view.data = address_of(call_method(tensor, names.data_ptr));
  }
  view.shape.push_back(static_cast<std::uint64_t>(bytes_each));
  view.strides_bytes.push_back(1);
  read_storage(tensor, view, memory);
  view.framework = kTorchFramework;
  return view;
}

Result<TensorView> explain_zeros(const Torch& torch, PyObject* tensor, nb::object& memory,
                                 Result<TensorView> (*read)(const Torch&, PyObject*, nb::object&)) {
  try {
    return read(torch, tensor, memory);
  } catch (nb::python_error&) {
    // PyTorch's automatic differentiation makes zeros that have no storage.
    const nb::object is_zeros = nb::getattr(nb::handle(tensor), "_is_zerotensor", nb::none());
    if (is_zeros.is_none() || !is_true(is_zeros())) throw;
    return unsupported("is a tensor of zeros that takes no memory: save tensor.clone()");
  }
}

// ---- NumPy ----

// NumPy's array interface, version 3: what `__array_struct__` points to.
struct ArrayInterface {
  int two;
  int dimensions;
  char type_kind;
  int item_bytes;
  int flags;
  Py_ssize_t* shape;
  Py_ssize_t* strides;
  void* data;
  PyObject* description;
};
constexpr int kArrayNotSwapped = 0x200;
constexpr int kArrayWriteable = 0x400;

std::optional<DType> numpy_number(char kind, int item_bytes) {
  struct Known {
    char kind;
    int item_bytes;
    DType dtype;
  };
  constexpr Known kKnown[] = {{'b', 1, DType::kBool}, {'u', 1, DType::kU8},  {'i', 1, DType::kI8},
                              {'i', 2, DType::kI16},  {'u', 2, DType::kU16}, {'f', 2, DType::kF16},
                              {'i', 4, DType::kI32},  {'u', 4, DType::kU32}, {'f', 4, DType::kF32},
                              {'c', 8, DType::kC64},  {'f', 8, DType::kF64}, {'i', 8, DType::kI64},
                              {'u', 8, DType::kU64}};
  for (const Known& known : kKnown) {
    if (known.kind == kind && known.item_bytes == item_bytes) return known.dtype;
  }
  return std::nullopt;
}

Result<DType> numpy_element_type(PyObject* array, const ArrayInterface& interface) {
  if (const auto number = numpy_number(interface.type_kind, interface.item_bytes)) return *number;
  const nb::object dtype = nb::handle(array).attr("dtype");
  const std::string name = text_of(dtype.attr("name").ptr());
  if (dtype.attr("fields").is_none()) {
    if (const auto ml = ml_dtype_from_name(name)) return *ml;
  }
  std::string remedy;
  switch (interface.type_kind) {
    case 'c':
      remedy = "save array.view(numpy.float64).reshape(array.shape + (2,))";
      break;
    case 'f':
      remedy = "save array.astype(numpy.float64)";
      break;
    case 'O':
    case 'U':
    case 'S':
      remedy = "save array.tolist()";
      break;
    case 'M':
    case 'm':
      remedy = "save array.view(numpy.int64), and its unit beside it";
      break;
    default:
      remedy = "save its fields one by one, or convert it to a plain number type";
  }
  return unsupported("is an array of type " + name +
                     ", which safetensors does not know: " + remedy);
}

// The array that owns the memory of a view, so far as NumPy knows it.
nb::object owner_of(const Numpy& numpy, PyObject* array) {
  static const Name kBase("base");
  nb::object owner = nb::borrow(array);
  for (;;) {
    nb::object base = attribute(owner.ptr(), kBase);
    if (Py_TYPE(base.ptr()) != numpy.ndarray) return owner;
    owner = std::move(base);
  }
}

// An array's interface; the capsule keeps it alive.
std::pair<nb::object, const ArrayInterface*> interface_of(PyObject* array) {
  static const Name kArrayStruct("__array_struct__");
  nb::object capsule = attribute(array, kArrayStruct);
  const auto* interface =
      static_cast<const ArrayInterface*>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  if (interface == nullptr) throw nb::python_error();
  return {std::move(capsule), interface};
}

void fill_view(const ArrayInterface& interface, TensorView& view) {
  view.data = static_cast<std::byte*>(interface.data);
  view.shape.clear();
  view.strides_bytes.clear();
  for (int i = 0; i < interface.dimensions; ++i) {
    view.shape.push_back(static_cast<std::uint64_t>(interface.shape[i]));
    view.strides_bytes.push_back(interface.strides[i]);
  }
}

// Takes the owner's memory as the storage: a view of an array that was resized in place reaches
// outside of it.
void read_storage(const Numpy& numpy, PyObject* array, TensorView& view) {
  const nb::object owner = owner_of(numpy, array);
  TensorView whole = view;
  if (owner.ptr() != array) {
    const auto [capsule, interface] = interface_of(owner.ptr());
    fill_view(*interface, whole);
    // In bytes, whatever type the owner has.
    whole.dtype = DType::kU8;
    whole.shape.push_back(static_cast<std::uint64_t>(interface->item_bytes));
    whole.strides_bytes.push_back(1);
  }
  const auto [first, end] = whole.reach_bytes();
  view.storage_base = whole.data == nullptr ? nullptr : whole.data + first;
  view.storage_bytes = static_cast<std::uint64_t>(end - first);
}

Result<TensorView> view_of_numpy(const Numpy& numpy, PyObject* array) {
  const auto [capsule, interface] = interface_of(array);
  Result<DType> dtype = numpy_element_type(array, *interface);
  if (!dtype) return failure(std::move(dtype.error()));
  if ((interface->flags & kArrayNotSwapped) == 0) {
    return unsupported(
        "is an array of foreign byte order: save array.astype(array.dtype"
        ".newbyteorder('='))");
  }
  TensorView view;
  view.dtype = *dtype;
  fill_view(*interface, view);
  view.writable = (interface->flags & kArrayWriteable) != 0;
  view.framework = kNumpyFramework;
  read_storage(numpy, array, view);
  return view;
}

// ---- New ones ----

nb::object tuple_of(const std::vector<std::uint64_t>& shape) {
  nb::list extents;
  for (const std::uint64_t extent : shape) extents.append(nb::int_(extent));
  return checked(PyList_AsTuple(extents.ptr()));
}

// The shape that PyTorch gives to F4 elements, which it keeps in pairs.
Result<std::vector<std::uint64_t>> torch_shape(DType dtype, std::vector<std::uint64_t> shape) {
  if (dtype != DType::kF4) return shape;
  if (shape.empty() || shape.back() % 2 != 0) {
    return unsupported(
        "has an odd number of F4 elements in its last dimension, which PyTorch "
        "cannot hold: read it with another tool");
  }
  shape.back() /= 2;
  return shape;
}

Result<NewArray> make_tensor(const Torch& torch, DType dtype,
                             const std::vector<std::uint64_t>& shape) {
  PyObject* element_type = torch.dtypes[static_cast<std::size_t>(dtype)];
  if (element_type == nullptr) {
    return unsupported("has the type " + std::string(dtype_name(dtype)) +
                       ", which this PyTorch does not have: use a newer one");
  }
  auto extents = torch_shape(dtype, shape);
  if (!extents) return failure(std::move(extents.error()));
  NewArray made;
  // The device is named because torch.set_default_device() may have chosen another one.
  made.object = nb::handle(torch.module)
                    .attr("empty")(tuple_of(*extents), nb::arg("dtype") = nb::handle(element_type),
                                   nb::arg("device") = "cpu");
  std::byte* data = address_of(call_method(made.object.ptr(), torch_names().data_ptr));
  made.view = TensorView::row_major(data, dtype, shape);
  made.view.framework = kTorchFramework;
  return made;
}

Result<NewArray> make_numpy(DType dtype, const std::vector<std::uint64_t>& shape) {
  const Numpy* numpy = Numpy::import_if_installed();
  if (numpy == nullptr) return unsupported("is an array: install numpy to load it");
  const nb::object element_type = numpy->dtype(dtype);
  if (!element_type.is_valid()) {
    return unsupported("has the type " + std::string(dtype_name(dtype)) +
                       ", which NumPy does not have: install ml_dtypes or torch to load it");
  }
  NewArray made;
  made.object = nb::handle(numpy->module).attr("empty")(tuple_of(shape), element_type);
  const auto [capsule, interface] = interface_of(made.object.ptr());
  made.view = TensorView::row_major(interface->data, dtype, shape);
  made.view.framework = kNumpyFramework;
  return made;
}

// The bytes of an owner as a one-dimensional NumPy array over the same memory.
nb::object numpy_bytes(const NewArray& owner) {
  const nb::handle numpy(Numpy::import_if_installed()->module);
  const nb::object uint8 = numpy.attr("uint8");
  if (owner.view.framework == kNumpyFramework) {
    return owner.object.attr("reshape")(-1).attr("view")(uint8);
  }
  const nb::handle torch(Torch::if_imported()->module);
  nb::object bytes = torch.attr("empty")(nb::int_(0), nb::arg("dtype") = torch.attr("uint8"),
                                         nb::arg("device") = "cpu");
  return bytes.attr("set_")(owner.object.attr("untyped_storage")()).attr("numpy")();
}

nb::object numpy_alias(const NewArray& owner, const TensorView& part, std::uint64_t offset) {
  const Numpy& numpy = *Numpy::import_if_installed();
  const nb::object bytes = numpy_bytes(owner);
  const nb::object range = bytes[nb::slice(offset, offset + part.byte_count())];
  return range.attr("view")(numpy.dtype(part.dtype)).attr("reshape")(tuple_of(part.shape));
}

nb::object torch_alias(const Torch& torch, const NewArray& owner, const TensorView& part,
                       std::uint64_t offset) {
  nb::object base = owner.object;
  const nb::handle module(torch.module);
  if (owner.view.framework == kNumpyFramework) {
    base = module.attr("from_numpy")(numpy_bytes(owner));
  }
  const nb::handle dtype(torch.dtypes[static_cast<std::size_t>(part.dtype)]);
  nb::object alias =
      module.attr("empty")(nb::int_(0), nb::arg("dtype") = dtype, nb::arg("device") = "cpu");
  const auto extents = torch_shape(part.dtype, part.shape);
  return alias.attr("set_")(base.attr("untyped_storage")(),
                            nb::int_(offset / static_cast<std::uint64_t>(item_bytes(part.dtype))),
                            tuple_of(*extents));
}

}  // namespace

ArrayKind array_kind(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  if (const Torch* torch = Torch::if_imported()) {
    if (type == torch->tensor || type == torch->parameter) return ArrayKind::kTorch;
    if (PyType_IsSubtype(type, torch->tensor) != 0) return ArrayKind::kTorchSubclass;
  }
  if (const Numpy* numpy = Numpy::if_imported()) {
    if (type == numpy->ndarray) return ArrayKind::kNumpy;
    if (PyType_IsSubtype(type, numpy->ndarray) != 0) return ArrayKind::kNumpySubclass;
  }
  return ArrayKind::kNone;
}

Result<TensorView> view_of(PyObject* object, ArrayKind kind, nb::object& memory) {
  if (kind == ArrayKind::kTorch) {
    return explain_zeros(*Torch::if_imported(), object, memory, &read_torch);
  }
  memory = nb::borrow(object);
  return view_of_numpy(*Numpy::if_imported(), object);
}

Result<TensorView> bytes_view_of(PyObject* tensor, nb::object& memory) {
  return explain_zeros(*Torch::if_imported(), tensor, memory, &read_torch_bytes);
}

Result<NewArray> make_array(const std::string& framework, DType dtype,
                            const std::vector<std::uint64_t>& shape) {
  const Torch* torch = nullptr;
  if (framework == kTorchFramework) torch = Torch::import_if_installed();
  Result<NewArray> made =
      torch != nullptr ? make_tensor(*torch, dtype, shape) : make_numpy(dtype, shape);
  if (made) {
    made->view.storage_base = made->view.data;
    made->view.storage_bytes = made->view.byte_count();
    made->view.writable = true;
  }
  return made;
}

nb::object make_alias(const NewArray& owner, const TensorView& part, const std::string& framework) {
  const auto offset = static_cast<std::uint64_t>(part.data - owner.view.data);
  const Torch* torch = nullptr;
  if (framework == kTorchFramework) torch = Torch::import_if_installed();
  if (offset % static_cast<std::uint64_t>(item_bytes(part.dtype)) == 0) {
    return torch != nullptr ? torch_alias(*torch, owner, part, offset)
                            : numpy_alias(owner, part, offset);
  }
  NewArray copy = std::move(*make_array(framework, part.dtype, part.shape));
  std::copy_n(part.data, part.byte_count(), copy.view.data);
  return copy.object;
}

}  // namespace strandline::python
