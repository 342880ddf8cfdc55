// The walk over a job's Python objects.
//
// Problem: turn whatever a training job consists of into the engine's StateDict, exactly or not at
// all, in the few milliseconds that the trainer waits. A value that would come back as something
// else (an IntEnum as an int, a namedtuple as a tuple) is refused by its key path.
//
// Approach: one recursive descent in C++ with the GIL. At each object the order of questions is:
//   1. exactly a plain type (plain_values.h)?         -> value
//   2. exactly dict, OrderedDict, Counter, list, tuple? -> container, descend
//   3. a tensor or array (arrays.h)?                  -> view
//   4. has it state_dict()?                           -> call it, descend into the result
//   5. pickling allowed?                              -> value
//   6. refuse, with the remedy that fits.
// Question 4 comes after 2 so that a plain dict is never asked, and before 5 so that allowing
// pickles changes nothing for objects that know how to save themselves.
//
// Life cycle: user code runs during the walk (state_dict(), properties of tensors) and may change
// any container. So items are taken out first and held; nothing is borrowed across a call. What the
// views point into is held by Collected until the engine call is over.
//
// Depth: the builder refuses more than kStateDepthMax levels, which bounds the recursion; cycles
// are looked for on the path from the root, so that they are named as such.

#include "collect.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "arrays.h"
#include "errors.h"
#include "objects.h"
#include "plain_values.h"

namespace strandline::python {
namespace {

PyTypeObject* type_from_collections(const char* name) {
  return reinterpret_cast<PyTypeObject*>(
      nb::getattr(nb::module_::import_("collections"), name).release().ptr());
}

// The kind of container that an object is, by its exact type.
std::optional<NodeKind> container_kind(PyObject* object) {
  // Plain pointers: no guard may be held while an import runs Python code.
  static PyTypeObject* ordered_dict = nullptr;
  static PyTypeObject* counter = nullptr;
  if (ordered_dict == nullptr) ordered_dict = type_from_collections("OrderedDict");
  if (counter == nullptr) counter = type_from_collections("Counter");
  PyTypeObject* type = Py_TYPE(object);
  if (type == &PyDict_Type) return NodeKind::kDict;
  if (type == ordered_dict) return NodeKind::kOrderedDict;
  if (type == &PyList_Type) return NodeKind::kList;
  if (type == &PyTuple_Type) return NodeKind::kTuple;
  if (type == counter) return NodeKind::kCounter;
  return std::nullopt;
}

bool is_mapping(NodeKind kind) {
  return kind == NodeKind::kDict || kind == NodeKind::kOrderedDict || kind == NodeKind::kCounter;
}

// The bound state_dict of an object, if it has one. A class has only an unbound one.
nb::object state_dict_method(PyObject* object) {
  static const Name kStateDict("state_dict");
  if (PyType_Check(object) != 0) return {};
  PyObject* method = PyObject_GetAttr(object, kStateDict.get());
  if (method == nullptr) {
    if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) throw nb::python_error();
    PyErr_Clear();
    return {};
  }
  nb::object held = nb::steal(method);
  if (PyCallable_Check(method) == 0) return {};
  return held;
}

// The items of a mapping, in its order. They are held outside of Python: a list of ten thousand
// tuples would set off the garbage collector, which costs more than the whole walk.
std::vector<std::pair<nb::object, nb::object>> items_of(PyObject* mapping) {
  std::vector<std::pair<nb::object, nb::object>> items;
  items.reserve(static_cast<std::size_t>(PyDict_Size(mapping)));
  if (PyDict_CheckExact(mapping) != 0) {
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    Py_ssize_t position = 0;
    while (PyDict_Next(mapping, &position, &key, &value) != 0) {
      items.emplace_back(nb::borrow(key), nb::borrow(value));
    }
    return items;
  }
  // An OrderedDict has an order of its own, which only its iterator knows.
  const nb::object iterator = checked(PyObject_GetIter(mapping));
  while (PyObject* key = PyIter_Next(iterator.ptr())) {
    nb::object held = nb::steal(key);
    nb::object value = checked(PyObject_GetItem(mapping, key));
    items.emplace_back(std::move(held), std::move(value));
  }
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  return items;
}

std::string remedy_for(PyObject* object, ArrayKind kind) {
  PyTypeObject* type = Py_TYPE(object);
  const std::string name = type_name(type);
  if (kind == ArrayKind::kTorchSubclass) {
    if (name.ends_with(".DTensor")) return "save tensor.to_local() or tensor.full_tensor()";
    if (name.find("Uninitialized") != std::string::npos) {
      return "run the lazy module once, so that it has values";
    }
    return "save a plain tensor: tensor.as_subclass(torch.Tensor) if its memory says it all, else "
           "the tensors that it wraps";
  }
  if (kind == ArrayKind::kNumpySubclass) return "save numpy.asarray(array), or the parts of it";
  if (PyTuple_Check(object) != 0) return "save tuple(value)";
  if (PyDict_Check(object) != 0) return "save dict(value)";
  if (PyList_Check(object) != 0) return "save list(value)";
  if (PyObject_HasAttrString(reinterpret_cast<PyObject*>(type), "__members__") != 0) {
    return "save its .value or .name";
  }
  if (PyLong_Check(object) != 0) return "save int(value)";
  if (PyFloat_Check(object) != 0) return "save float(value)";
  if (PyUnicode_Check(object) != 0) return "save str(value)";
  if (PyAnySet_Check(object) != 0) return "save sorted(value)";
  return "save what it consists of, or give it state_dict() and load_state_dict()";
}

[[noreturn]] void refuse(ErrorCode code, const std::string& key_path, std::string message) {
  raise(Error{.code = code, .message = std::move(message), .key_path = key_path});
}

// The error of code that is not ours, with it as the cause. Signals pass as they are.
[[noreturn]] void rethrow(nb::python_error& error, const std::string& key_path,
                          const std::string& what, const char* remedy) {
  if (!error.matches(PyExc_Exception)) throw;
  raise_from(Error{.code = ErrorCode::kUnsupported,
                   .message = "cannot save '" + key_path + "': " + what +
                              " failed; its own error is the cause of this one: " + remedy,
                   .key_path = key_path},
             error);
}

nb::object call_state_dict(const nb::object& method, const std::string& key_path) {
  try {
    return method();
  } catch (nb::python_error& error) {
    rethrow(error, key_path, "its state_dict()", "correct it, or take the object out of the state");
  }
}

class Collector {
 public:
  Collector(NodeKind root, bool allow_pickle) : builder_(root), allow_pickle_(allow_pickle) {}

  // Adds the items of the root, which is of the kind given to the constructor.
  void add_root(PyObject* root, NodeKind kind) {
    ++next_node_;
    add_items(root, kind);
  }

  // Remembers an object whose state is what is added next, or the root.
  void remember(std::string key_path, nb::object object, nb::object state_dict) {
    collected_.objects.push_back({std::move(key_path), std::move(object), next_node_});
    collected_.state_dicts.push_back(std::move(state_dict));
  }

  Collected finish(nb::object root) {
    collected_.state = unwrap(builder_.finish());
    collected_.root = std::move(root);
    return std::move(collected_);
  }

 private:
  // Holds a container on the path from the root while its items are added.
  class OnPath {
   public:
    OnPath(Collector& collector, PyObject* container) : collector_(collector) {
      collector_.path_.push_back(container);
    }
    ~OnPath() { collector_.path_.pop_back(); }
    OnPath(const OnPath&) = delete;
    OnPath& operator=(const OnPath&) = delete;

   private:
    Collector& collector_;
  };

  [[nodiscard]] std::string path_text(const Key& key) const { return builder_.path_text(key); }

  void add(const Key& key, PyObject* object) {
    if (add_value(key, object)) return;
    if (const auto kind = container_kind(object)) return add_container(key, object, *kind);
    const ArrayKind array = array_kind(object);
    if (array == ArrayKind::kTorch || array == ArrayKind::kNumpy) {
      return add_tensor(key, object, array);
    }
    if (array == ArrayKind::kNone) {
      if (const nb::object method = state_dict_of(key, object); method.is_valid()) {
        return add_stateful(key, object, method);
      }
      if (allow_pickle_) return add_pickle(key, object);
    }
    const std::string path = path_text(key);
    refuse(ErrorCode::kUnsupported, path,
           "cannot save '" + path + "', a " + type_name(Py_TYPE(object)) +
               ", which would not come back as it is: " + remedy_for(object, array) +
               (array == ArrayKind::kNone ? ", or pass allow_pickle=True" : ""));
  }

  bool add_value(const Key& key, PyObject* object) {
    std::optional<Value> value;
    try {
      value = value_of(object);
    } catch (nb::python_error& error) {
      rethrow(error, path_text(key), "reading a " + type_name(Py_TYPE(object)),
              "save what it holds while it can be read, or take it out of the state");
    }
    if (!value) return false;
    unwrap(builder_.value(key, std::move(*value)));
    ++next_node_;
    return true;
  }

  void add_container(const Key& key, PyObject* object, NodeKind kind) {
    if (std::find(path_.begin(), path_.end(), object) != path_.end()) {
      const std::string path = path_text(key);
      refuse(ErrorCode::kInvalidArgument, path,
             "cannot save '" + path + "': this " + type_name(Py_TYPE(object)) +
                 " contains itself; take the cycle out of the state");
    }
    unwrap(builder_.begin(key, kind));
    ++next_node_;
    add_items(object, kind);
    unwrap(builder_.end());
  }

  void add_items(PyObject* container, NodeKind kind) {
    const OnPath on_path(*this, container);
    if (kind == NodeKind::kOrderedDict) add_metadata(container);
    if (is_mapping(kind)) return add_mapping(container);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(container); ++i) {
      const nb::object item = nb::borrow(PySequence_Fast_GET_ITEM(container, i));
      add(Key(static_cast<std::int64_t>(i)), item.ptr());
    }
  }

  void add_mapping(PyObject* mapping) {
    for (const auto& [name, object] : items_of(mapping)) {
      const std::optional<Key> key = key_of(name.ptr());
      if (!key) refuse_key(name.ptr());
      add(*key, object.ptr());
    }
  }

  [[noreturn]] void refuse_key(PyObject* name) {
    const nb::object ascii = checked(PyObject_ASCII(name));
    const std::string path = path_text(Key(std::string(utf8_of(ascii.ptr()))));
    refuse(ErrorCode::kUnsupported, path,
           "cannot save '" + path + "': a key of type " + type_name(Py_TYPE(name)) +
               " is not kept exactly; use None, bool, int, float, bytes, or str without lone "
               "surrogates");
  }

  // PyTorch hangs versions of modules on the OrderedDict of a model, as an attribute.
  void add_metadata(PyObject* ordered_dict) {
    static const Name kMetadata("_metadata");
    PyObject* found = PyObject_GetAttr(ordered_dict, kMetadata.get());
    if (found == nullptr) {
      PyErr_Clear();
      return;
    }
    const nb::object metadata = nb::steal(found);
    const std::optional<NodeKind> kind = container_kind(found);
    if (!kind || !is_mapping(*kind)) {
      const std::string path = path_text(Key("_metadata"));
      refuse(ErrorCode::kUnsupported, path,
             "cannot save '" + path + "': the _metadata of an OrderedDict must be a dict, not " +
                 type_name(Py_TYPE(found)));
    }
    unwrap(builder_.begin_metadata(*kind));
    ++next_node_;
    ++metadata_depth_;
    add_items(found, *kind);
    --metadata_depth_;
    unwrap(builder_.end());
    collected_.state_dicts.push_back(metadata);
  }

  void add_tensor(const Key& key, PyObject* object, ArrayKind kind) {
    std::optional<Result<TensorView>> view;
    nb::object memory;
    try {
      view = view_of(object, kind, memory);
    } catch (nb::python_error& error) {
      rethrow(error, path_text(key), "reading a tensor's attributes",
              "save it outside of functions that torch.func transforms or torch.compile traces, "
              "or take it out of the state");
    }
    if (metadata_depth_ > 0) view = failure(ErrorCode::kUnsupported, "is a tensor in _metadata");
    if (!*view) {
      Error error = std::move((*view).error());
      error.key_path = path_text(key);
      error.message = "cannot save '" + error.key_path + "': it " + error.message;
      raise(error);
    }
    unwrap(builder_.tensor(key, std::move(**view)));
    ++next_node_;
    collected_.tensors.push_back(nb::borrow(object));
    collected_.memory.push_back(std::move(memory));
  }

  nb::object state_dict_of(const Key& key, PyObject* object) {
    try {
      return state_dict_method(object);
    } catch (nb::python_error& error) {
      rethrow(error, path_text(key), "looking for state_dict",
              "correct the lookup, or take the object out of the state");
    }
  }

  void add_stateful(const Key& key, PyObject* object, const nb::object& method) {
    std::string path = path_text(key);
    nb::object state = call_state_dict(method, path);
    remember(path, nb::borrow(object), state);
    // An object that answers with another object (or itself) could go on for ever.
    if (state_dict_of(key, state.ptr()).is_valid() && !container_kind(state.ptr())) {
      refuse(ErrorCode::kUnsupported, path,
             "cannot save '" + path + "': its state_dict() gives a " +
                 type_name(Py_TYPE(state.ptr())) + " instead of a dict of values");
    }
    add(key, state.ptr());
  }

  void add_pickle(const Key& key, PyObject* object) {
    std::optional<Value> value;
    try {
      value = pickle_of(object);
    } catch (nb::python_error& error) {
      rethrow(error, path_text(key), "pickling a " + type_name(Py_TYPE(object)),
              "save what it consists of, or take it out of the state");
    }
    unwrap(builder_.value(key, std::move(*value)));
    ++next_node_;
  }

  StateDictBuilder builder_;
  Collected collected_;
  std::vector<PyObject*> path_;  // Containers from the root to here; all are held.
  int metadata_depth_ = 0;
  std::uint32_t next_node_ = 0;  // The index of the node that the builder adds next.
  bool allow_pickle_;
};

}  // namespace

Collected collect(nb::handle root, bool allow_pickle) {
  if (const auto kind = container_kind(root.ptr()); kind && is_mapping(*kind)) {
    Collector collector(*kind, allow_pickle);
    collector.add_root(root.ptr(), *kind);
    return collector.finish(nb::borrow(root));
  }
  if (const nb::object method = state_dict_method(root.ptr()); method.is_valid()) {
    nb::object state = call_state_dict(method, "state");
    if (const auto kind = container_kind(state.ptr()); kind && is_mapping(*kind)) {
      Collector collector(*kind, allow_pickle);
      collector.remember("", nb::borrow(root), state);
      collector.add_root(state.ptr(), *kind);
      return collector.finish(nb::borrow(root));
    }
  }
  raise(
      Error{.code = ErrorCode::kInvalidArgument,
            .message = "the state must be a dict, or an object whose state_dict() gives one, not " +
                       type_name(Py_TYPE(root.ptr())) + ": put it into a dict under a name"});
}

StateDict collect_plain(nb::handle root, const char* what) {
  Collected collected = collect(root, false);
  if (!collected.tensors.empty() || !collected.objects.empty()) {
    const Structure& structure = collected.state.structure();
    const std::string path = collected.objects.empty()
                                 ? structure.path_text(structure.tensors().front().node)
                                 : collected.objects.front().key_path;
    raise(Error{.code = ErrorCode::kInvalidArgument,
                .message = std::string(what) + " must be a dict of plain values, but '" + path +
                           "' is none: put it into the state",
                .key_path = path});
  }
  return std::move(collected.state);
}

}  // namespace strandline::python
