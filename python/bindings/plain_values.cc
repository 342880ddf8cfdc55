// Plain values at the border.
//
// Problem: a checkpoint must give back exactly what was saved: the type, every bit of a float, an
// integer of any size, text that is not valid Unicode. Losing any of it silently is the failure
// that users find weeks later.
//
// Approach: the types that the engine knows (None, bool, int, float, str, bytes) map one to one.
// Others that stock training states hold are kept as a Value::Tagged: a name and the fields needed
// to make them again. The engine carries these without understanding them, and the format can list
// them. Types are compared exactly: `isinstance` would turn an IntEnum into an int.
//
//   tag              fields
//   "str"            its bytes under "surrogatepass" (only text with lone surrogates)
//   "bytearray"      its bytes
//   "complex"        real part, imaginary part
//   "io.BytesIO"     its bytes, position
//   "numpy.scalar"   dtype name (or type string for dates), its bytes
//   "numpy.str_"     its text           "numpy.bytes_"   its bytes
//   "torch.Size"     its extents        "torch.dtype"    its name without "torch."
//   "torch.device"   type, index or None
//   "pickle"         its bytes (only where the user allowed it, on both sides)
//
// Without PyTorch, torch.Size comes as a tuple, torch.dtype and torch.device as text.

#include "plain_values.h"

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "errors.h"
#include "frameworks.h"
#include "objects.h"

namespace strandline::python {
namespace {

Value::Tagged tagged(const char* tag, std::vector<Value> fields) {
  return Value::Tagged{tag, std::move(fields)};
}

Value::Bytes bytes_of(PyObject* bytes) {
  return Value::Bytes{
      std::string(PyBytes_AS_STRING(bytes), static_cast<std::size_t>(PyBytes_GET_SIZE(bytes)))};
}

nb::object bytes_object(const std::string& data) {
  return checked(PyBytes_FromStringAndSize(data.data(), static_cast<Py_ssize_t>(data.size())));
}

nb::object text_object(const std::string& text) {
  return checked(PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), nullptr));
}

// ---- Integers of any size ----
// Python limits int <-> decimal text to 4300 digits by default (a guard against slow input); chunks
// below that stay outside of the limit.

constexpr std::size_t kChunkDigits = 4000;

nb::object chunk_factor() {
  const nb::object ten = nb::int_(10);
  const nb::object digits = nb::int_(kChunkDigits);
  return checked(PyNumber_Power(ten.ptr(), digits.ptr(), Py_None));
}

std::string short_decimal(PyObject* number) {
  const nb::object text = checked(PyObject_Str(number));
  return std::string(utf8_of(text.ptr()));
}

std::string decimal_of(PyObject* number) {
  const nb::object zero = nb::int_(0);
  const int negative = PyObject_RichCompareBool(number, zero.ptr(), Py_LT);
  checked_status(negative);
  nb::object rest = checked(PyNumber_Absolute(number));
  const nb::object factor = chunk_factor();
  std::vector<std::string> chunks;
  do {
    const nb::object pair = checked(PyNumber_Divmod(rest.ptr(), factor.ptr()));
    chunks.push_back(short_decimal(PyTuple_GET_ITEM(pair.ptr(), 1)));
    rest = nb::borrow(PyTuple_GET_ITEM(pair.ptr(), 0));
  } while (is_true(rest));
  std::string text = negative != 0 ? "-" : "";
  text += chunks.back();
  for (std::size_t i = chunks.size() - 1; i-- > 0;) {
    text.append(kChunkDigits - chunks[i].size(), '0');
    text += chunks[i];
  }
  return text;
}

nb::object integer_of(const std::string& decimal) {
  const bool negative = decimal.starts_with('-');
  const std::string digits = decimal.substr(negative ? 1 : 0);
  const nb::object factor = chunk_factor();
  nb::object number = nb::int_(0);
  const std::size_t leading = (digits.size() - 1) % kChunkDigits + 1;
  for (std::size_t at = 0; at < digits.size();) {
    const std::size_t length = at == 0 ? leading : kChunkDigits;
    const std::string chunk = digits.substr(at, length);
    const nb::object low = checked(PyLong_FromString(chunk.c_str(), nullptr, 10));
    const nb::object high = checked(PyNumber_Multiply(number.ptr(), factor.ptr()));
    number = checked(PyNumber_Add(high.ptr(), low.ptr()));
    at += length;
  }
  return negative ? checked(PyNumber_Negative(number.ptr())) : number;
}

Value value_of_integer(PyObject* number) {
  int overflow = 0;
  const long long small = PyLong_AsLongLongAndOverflow(number, &overflow);
  if (overflow != 0) return Value::BigInteger{decimal_of(number)};
  if (small == -1 && PyErr_Occurred() != nullptr) throw nb::python_error();
  return Value(static_cast<std::int64_t>(small));
}

// ---- Saving ----

Value value_of_text(PyObject* text) {
  Py_ssize_t bytes = 0;
  if (const char* data = PyUnicode_AsUTF8AndSize(text, &bytes)) {
    return Value(std::string(data, static_cast<std::size_t>(bytes)));
  }
  if (PyErr_ExceptionMatches(PyExc_UnicodeEncodeError) == 0) throw nb::python_error();
  PyErr_Clear();
  const nb::object encoded = checked(PyUnicode_AsEncodedString(text, "utf-8", "surrogatepass"));
  return tagged("str", {bytes_of(encoded.ptr())});
}

Value value_of_bytes_io(PyObject* stream) {
  static const Name kGetValue("getvalue");
  static const Name kTell("tell");
  const nb::object content = call_method(stream, kGetValue);
  const nb::object position = call_method(stream, kTell);
  return tagged("io.BytesIO", {bytes_of(content.ptr()), value_of_integer(position.ptr())});
}

// Numbers keep their dtype's name, dates their type string with its unit. Types whose bytes mean
// something on one kind of machine only (longdouble) and records are not kept.
std::optional<Value> value_of_numpy_scalar(PyObject* scalar) {
  const nb::object dtype = nb::handle(scalar).attr("dtype");
  const char kind = *nb::str(dtype.attr("kind")).c_str();
  const auto item_bytes = nb::cast<std::size_t>(dtype.attr("itemsize"));
  if (kind == 'U') {
    const nb::object text = checked(PyUnicode_FromObject(scalar));
    return tagged("numpy.str_", {value_of_text(text.ptr())});
  }
  if (kind == 'S') return tagged("numpy.bytes_", {bytes_of(scalar)});
  const bool date = kind == 'M' || kind == 'm';
  const bool number = kind == 'b' || kind == 'i' || kind == 'u' ||
                      (kind == 'f' && item_bytes <= sizeof(double)) ||
                      (kind == 'c' && item_bytes <= 2 * sizeof(double));
  const nb::object module = nb::getattr(dtype.attr("type"), "__module__", nb::none());
  const bool ml = kind != 'O' && nb::str("ml_dtypes").equal(module);
  if (!date && !number && !ml) return std::nullopt;
  const nb::object name = dtype.attr(date ? "str" : "name");
  const nb::object bytes = nb::handle(scalar).attr("tobytes")();
  return tagged("numpy.scalar", {Value(utf8_of(name.ptr())), bytes_of(bytes.ptr())});
}

Value value_of_torch_size(PyObject* size) {
  std::vector<Value> extents;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(size); ++i) {
    const nb::object extent = checked(PyNumber_Index(PyTuple_GET_ITEM(size, i)));
    extents.push_back(value_of_integer(extent.ptr()));
  }
  return tagged("torch.Size", std::move(extents));
}

Value value_of_torch_dtype(PyObject* dtype) {
  const nb::object text = checked(PyObject_Str(dtype));
  std::string_view name = utf8_of(text.ptr());
  constexpr std::string_view kPrefix = "torch.";
  if (name.starts_with(kPrefix)) name.remove_prefix(kPrefix.size());
  return tagged("torch.dtype", {Value(name)});
}

Value value_of_torch_device(PyObject* device) {
  const nb::object type = nb::handle(device).attr("type");
  const nb::object index = nb::handle(device).attr("index");
  return tagged("torch.device", {Value(utf8_of(type.ptr())),
                                 index.is_none() ? Value() : value_of_integer(index.ptr())});
}

std::optional<Value> value_of_framework_object(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  const Numpy* numpy = Numpy::if_imported();
  if (numpy != nullptr && PyType_IsSubtype(type, numpy->generic) != 0) {
    return value_of_numpy_scalar(object);
  }
  const Torch* torch = Torch::if_imported();
  if (torch == nullptr) return std::nullopt;
  if (type == torch->size) return value_of_torch_size(object);
  if (type == torch->dtype_type) return value_of_torch_dtype(object);
  if (type == torch->device) return value_of_torch_device(object);
  return std::nullopt;
}

PyTypeObject* bytes_io_type() {
  // No guard of the compiler's: importing may release the GIL while another thread waits for it.
  static PyObject* type = nullptr;
  if (type == nullptr) type = nb::getattr(nb::module_::import_("io"), "BytesIO").release().ptr();
  return reinterpret_cast<PyTypeObject*>(type);
}

// ---- Loading ----

[[noreturn]] void raise_malformed(const Value::Tagged& value, const std::string& key_path) {
  raise(Error{.code = ErrorCode::kCorrupt,
              .message = "cannot make '" + key_path + "' again: what the checkpoint says of its " +
                         value.tag + " makes no sense; use another checkpoint",
              .key_path = key_path});
}

// The fields of a tagged value, checked one by one as they are taken.
class Fields {
 public:
  Fields(const Value::Tagged& value, std::size_t count, const std::string& key_path)
      : value_(value), key_path_(key_path) {
    if (value.fields.size() != count) raise_malformed(value, key_path);
  }

  template <typename T>
  [[nodiscard]] const T& get(std::size_t index) const {
    const T* field = value_.fields[index].get_if<T>();
    if (field == nullptr) raise_malformed(value_, key_path_);
    return *field;
  }
  [[nodiscard]] bool is_none(std::size_t index) const {
    return value_.fields[index].get_if<Value::None>() != nullptr;
  }

 private:
  const Value::Tagged& value_;
  const std::string& key_path_;
};

using Maker = nb::object (*)(const Value::Tagged&, const std::string& key_path);

nb::object make_text(const Value::Tagged& value, const std::string& key_path) {
  const std::string& data = Fields(value, 1, key_path).get<Value::Bytes>(0).data;
  return checked(
      PyUnicode_DecodeUTF8(data.data(), static_cast<Py_ssize_t>(data.size()), "surrogatepass"));
}

nb::object make_bytearray(const Value::Tagged& value, const std::string& key_path) {
  const std::string& data = Fields(value, 1, key_path).get<Value::Bytes>(0).data;
  return checked(PyByteArray_FromStringAndSize(data.data(), static_cast<Py_ssize_t>(data.size())));
}

nb::object make_complex(const Value::Tagged& value, const std::string& key_path) {
  const Fields fields(value, 2, key_path);
  return checked(PyComplex_FromDoubles(fields.get<double>(0), fields.get<double>(1)));
}

nb::object make_bytes_io(const Value::Tagged& value, const std::string& key_path) {
  const Fields fields(value, 2, key_path);
  const nb::handle type(reinterpret_cast<PyObject*>(bytes_io_type()));
  nb::object stream = type(bytes_object(fields.get<Value::Bytes>(0).data));
  stream.attr("seek")(fields.get<std::int64_t>(1));
  return stream;
}

const Numpy& require_numpy(const std::string& key_path) {
  const Numpy* numpy = Numpy::import_if_installed();
  if (numpy == nullptr) {
    raise(Error{.code = ErrorCode::kUnsupported,
                .message = "cannot load '" + key_path + "', a NumPy scalar: install numpy",
                .key_path = key_path});
  }
  return *numpy;
}

nb::object make_numpy_scalar(const Value::Tagged& value, const std::string& key_path) {
  const Fields fields(value, 2, key_path);
  const Numpy& numpy = require_numpy(key_path);
  const std::string& name = fields.get<std::string>(0);
  const nb::handle module(numpy.module);
  nb::object dtype;
  if (PyObject* ml_dtypes = PyImport_ImportModule("ml_dtypes")) {
    // Registers its names with NumPy.
    Py_DECREF(ml_dtypes);
  } else {
    PyErr_Clear();
  }
  dtype = module.attr("dtype")(name.c_str());
  if (nb::cast<bool>(dtype.attr("hasobject"))) raise_malformed(value, key_path);
  const nb::object data = bytes_object(fields.get<Value::Bytes>(1).data);
  const nb::object array = module.attr("frombuffer")(data, nb::arg("dtype") = dtype);
  if (nb::len(array) != 1) raise_malformed(value, key_path);
  return array[0];
}

nb::object make_numpy_text(const Value::Tagged& value, const std::string& key_path) {
  if (value.fields.size() != 1) raise_malformed(value, key_path);
  const nb::object text = object_of(value.fields[0], false, key_path);
  return nb::handle(require_numpy(key_path).module).attr("str_")(text);
}

nb::object make_numpy_bytes(const Value::Tagged& value, const std::string& key_path) {
  const Fields fields(value, 1, key_path);
  const nb::handle module(require_numpy(key_path).module);
  return module.attr("bytes_")(bytes_object(fields.get<Value::Bytes>(0).data));
}

nb::object make_torch_size(const Value::Tagged& value, const std::string& key_path) {
  const Fields fields(value, value.fields.size(), key_path);
  nb::list extents;
  for (std::size_t i = 0; i < value.fields.size(); ++i) {
    extents.append(nb::int_(fields.get<std::int64_t>(i)));
  }
  nb::object tuple = checked(PyList_AsTuple(extents.ptr()));
  const Torch* torch = Torch::import_if_installed();
  if (torch == nullptr) return tuple;
  return nb::handle(reinterpret_cast<PyObject*>(torch->size))(tuple);
}

nb::object make_torch_dtype(const Value::Tagged& value, const std::string& key_path) {
  const std::string& name = Fields(value, 1, key_path).get<std::string>(0);
  const Torch* torch = Torch::import_if_installed();
  if (torch == nullptr) return text_object("torch." + name);
  nb::object dtype = nb::getattr(nb::handle(torch->module), name.c_str(), nb::none());
  // Any name could stand in a file; only a dtype may come out.
  if (Py_TYPE(dtype.ptr()) == torch->dtype_type) return dtype;
  raise(Error{.code = ErrorCode::kUnsupported,
              .message = "cannot load '" + key_path + "': this PyTorch has no torch." + name +
                         "; use the version that saved it",
              .key_path = key_path});
}

nb::object make_torch_device(const Value::Tagged& value, const std::string& key_path) {
  const Fields fields(value, 2, key_path);
  std::string text = fields.get<std::string>(0);
  if (!fields.is_none(1)) text += ":" + std::to_string(fields.get<std::int64_t>(1));
  const Torch* torch = Torch::import_if_installed();
  if (torch == nullptr) return text_object(text);
  return nb::handle(reinterpret_cast<PyObject*>(torch->device))(text.c_str());
}

nb::object make_pickled(const Value::Tagged& value, const std::string& key_path) {
  const Fields fields(value, 1, key_path);
  return nb::module_::import_("pickle").attr("loads")(
      bytes_object(fields.get<Value::Bytes>(0).data));
}

struct TagMaker {
  std::string_view tag;
  Maker make;
};
constexpr std::string_view kPickle = "pickle";
constexpr std::array kMakers = {
    TagMaker{"str", make_text},
    TagMaker{"bytearray", make_bytearray},
    TagMaker{"complex", make_complex},
    TagMaker{"io.BytesIO", make_bytes_io},
    TagMaker{"numpy.scalar", make_numpy_scalar},
    TagMaker{"numpy.str_", make_numpy_text},
    TagMaker{"numpy.bytes_", make_numpy_bytes},
    TagMaker{"torch.Size", make_torch_size},
    TagMaker{"torch.dtype", make_torch_dtype},
    TagMaker{"torch.device", make_torch_device},
    TagMaker{kPickle, make_pickled},
};

nb::object make_tagged(const Value::Tagged& value, const std::string& key_path) {
  for (const TagMaker& maker : kMakers) {
    if (maker.tag != value.tag) continue;
    try {
      return maker.make(value, key_path);
    } catch (nb::python_error& error) {
      if (error.matches(nb::module_::import_("strandline.errors").attr("Error"))) throw;
      if (!error.matches(PyExc_Exception)) throw;
      raise_from(Error{.code = ErrorCode::kUnsupported,
                       .message = "cannot make '" + key_path + "', a " + value.tag +
                                  ", again; its own error is the cause of this one",
                       .key_path = key_path},
                 error);
    }
  }
  raise(Error{.code = ErrorCode::kUnsupported,
              .message = "cannot load '" + key_path + "', a value of kind '" + value.tag +
                         "': this version does not know it; use a newer Strandline",
              .key_path = key_path});
}

struct ObjectOf {
  bool allow_pickle;
  const std::string& key_path;

  nb::object operator()(Value::None) const { return nb::none(); }
  nb::object operator()(bool value) const { return nb::bool_(value); }
  nb::object operator()(std::int64_t value) const { return nb::int_(value); }
  nb::object operator()(const Value::BigInteger& value) const { return integer_of(value.decimal); }
  nb::object operator()(double value) const { return nb::float_(value); }
  nb::object operator()(const std::string& value) const { return text_object(value); }
  nb::object operator()(const Value::Bytes& value) const { return bytes_object(value.data); }
  nb::object operator()(const Value::List& value) const {
    nb::list list;
    for (const Value& item : value) list.append(object_of(item, allow_pickle, key_path));
    return list;
  }
  nb::object operator()(const Value::Tagged& value) const {
    if (value.tag == kPickle && !allow_pickle) {
      raise(Error{.code = ErrorCode::kUnsupported,
                  .message = "'" + key_path + "' is a pickle, which can run any code when it is " +
                             "loaded: pass allow_pickle=True if you trust who wrote it",
                  .key_path = key_path});
    }
    return make_tagged(value, key_path);
  }
};

}  // namespace

std::optional<Value> value_of(PyObject* object) {
  if (object == Py_None) return Value();
  PyTypeObject* type = Py_TYPE(object);
  if (type == &PyBool_Type) return Value(object == Py_True);
  if (type == &PyLong_Type) return value_of_integer(object);
  if (type == &PyFloat_Type) return Value(PyFloat_AS_DOUBLE(object));
  if (type == &PyUnicode_Type) return value_of_text(object);
  if (type == &PyBytes_Type) return Value(bytes_of(object));
  if (type == &PyComplex_Type) {
    return Value(tagged(
        "complex", {Value(PyComplex_RealAsDouble(object)), Value(PyComplex_ImagAsDouble(object))}));
  }
  if (type == &PyByteArray_Type) {
    return Value(tagged(
        "bytearray",
        {Value::Bytes{std::string(PyByteArray_AS_STRING(object),
                                  static_cast<std::size_t>(PyByteArray_GET_SIZE(object)))}}));
  }
  if (type == bytes_io_type()) return value_of_bytes_io(object);
  return value_of_framework_object(object);
}

std::optional<Key> key_of(PyObject* key) {
  PyTypeObject* type = Py_TYPE(key);
  const bool plain = key == Py_None || type == &PyBool_Type || type == &PyLong_Type ||
                     type == &PyFloat_Type || type == &PyUnicode_Type || type == &PyBytes_Type;
  if (!plain) return std::nullopt;
  std::optional<Value> value = value_of(key);
  if (value->get_if<Value::Tagged>() != nullptr) return std::nullopt;  // Lone surrogates.
  return value;
}

Value pickle_of(PyObject* object) {
  constexpr int kProtocol = 4;  // Every Python that we support reads it.
  const nb::object data =
      nb::module_::import_("pickle").attr("dumps")(nb::handle(object), kProtocol);
  return tagged("pickle", {bytes_of(data.ptr())});
}

nb::object object_of(const Value& value, bool allow_pickle, const std::string& key_path) {
  return std::visit(ObjectOf{allow_pickle, key_path}, value.data());
}

}  // namespace strandline::python
