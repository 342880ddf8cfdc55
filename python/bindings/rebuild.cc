// From what the engine read to Python objects.
//
// Memory: the engine asks for memory tensor by tensor, from within a call that runs without the
// GIL; the callback takes the GIL, makes a tensor, keeps it here and hands out a borrowed view.
// When the newest checkpoint turns out to be damaged the engine starts again with an older one and
// asks for the same index again: the later answer replaces the earlier one, whose memory the engine
// has dropped by then. Tensors that were aliases come back as views into another's memory; they are
// found by their address.

#include "rebuild.h"

#include <iterator>
#include <string>
#include <utility>

#include "errors.h"
#include "objects.h"
#include "plain_values.h"

namespace strandline::python {

Allocator Allocations::allocator() {
  return [this](const Structure& structure, std::uint32_t tensor) {
    const nb::gil_scoped_acquire gil;
    return allocate(structure, tensor);
  };
}

Result<TensorView> Allocations::allocate(const Structure& structure, std::uint32_t tensor) {
  const Structure::Tensor& wanted = structure.tensors()[tensor];
  const auto with_path = [&](Error error) {
    error.key_path = structure.path_text(wanted.node);
    error.message = "cannot load '" + error.key_path + "': it " + error.message;
    return failure(std::move(error));
  };
  try {
    Result<NewArray> made = make_array(wanted.framework, wanted.dtype, wanted.shape);
    if (!made) return with_path(std::move(made.error()));
    TensorView view = made->view;
    if (const auto old = by_tensor_.find(tensor); old != by_tensor_.end()) {
      by_address_.erase(old->second.view.data);
    }
    if (view.byte_count() > 0) by_address_.insert_or_assign(view.data, tensor);
    by_tensor_.insert_or_assign(tensor, std::move(*made));
    return view;
  } catch (nb::python_error& error) {
    pending_.emplace(std::move(error));
    return with_path(Error{.code = ErrorCode::kMemoryLimit,
                           .message = "could not be allocated: load fewer keys at a time"});
  }
}

void Allocations::raise_pending() {
  if (pending_) throw std::exchange(pending_, std::nullopt).value();
}

nb::object Allocations::object_of(const Structure& structure, std::uint32_t tensor,
                                  const TensorView& view) const {
  const Structure::Tensor& saved = structure.tensors()[tensor];
  const std::uint64_t bytes = view.byte_count();
  const auto own = by_tensor_.find(tensor);
  if (own != by_tensor_.end() && (bytes == 0 || own->second.view.data == view.data)) {
    return own->second.object;
  }
  if (bytes == 0) return unwrap(make_array(saved.framework, saved.dtype, saved.shape)).object;
  // The last owner that begins at or before the view.
  const auto after = by_address_.upper_bound(view.data);
  if (after != by_address_.begin()) {
    const NewArray& owner = by_tensor_.at(std::prev(after)->second);
    if (view.data + bytes <= owner.view.data + owner.view.byte_count()) {
      return make_alias(owner, view, saved.framework);
    }
  }
  const std::string path = structure.path_text(saved.node);
  raise(Error{.code = ErrorCode::kUnsupported,
              .message = "cannot load '" + path + "': no memory was read for it",
              .key_path = path});
}

namespace {

class TreeMaker {
 public:
  TreeMaker(const StateDict& state, const TensorObjects& tensors, const ValueObjects& values)
      : state_(state), tensors_(tensors), values_(values) {}

  [[nodiscard]] nb::object make(std::uint32_t index) const {
    const Structure::Node& node = structure().nodes()[index];
    switch (node.kind) {
      case NodeKind::kTensor:
        return tensors_[node.leaf];
      case NodeKind::kValue:
        return values_[node.leaf];
      case NodeKind::kList:
      case NodeKind::kTuple:
        return make_sequence(index);
      case NodeKind::kDict:
        return fill(index, nb::dict());
      case NodeKind::kOrderedDict:
        return fill(index, from_collections("OrderedDict"));
      case NodeKind::kCounter:
        return fill(index, from_collections("Counter"));
    }
    return nb::none();
  }

 private:
  [[nodiscard]] const Structure& structure() const { return state_.structure(); }

  static nb::object from_collections(const char* name) {
    return nb::module_::import_("collections").attr(name)();
  }

  [[nodiscard]] nb::object make_sequence(std::uint32_t index) const {
    const auto& nodes = structure().nodes();
    nb::list items;
    for (auto child = index + 1; child < nodes[index].end; child = nodes[child].end) {
      items.append(make(child));
    }
    if (nodes[index].kind == NodeKind::kList) return items;
    return checked(PyList_AsTuple(items.ptr()));
  }

  [[nodiscard]] nb::object fill(std::uint32_t index, nb::object mapping) const {
    const auto& nodes = structure().nodes();
    for (auto child = index + 1; child < nodes[index].end; child = nodes[child].end) {
      if (nodes[child].metadata) {
        mapping.attr("_metadata") = make(child);
        continue;
      }
      const nb::object key =
          python::object_of(nodes[child].key, false, structure().path_text(child));
      const nb::object value = make(child);
      if (!value.is_valid()) continue;
      checked_status(PyObject_SetItem(mapping.ptr(), key.ptr(), value.ptr()));
    }
    check_count(index, mapping);
    return mapping;
  }

  // Keys that differ for the engine may be one for Python, such as 1 and True.
  void check_count(std::uint32_t index, const nb::object& mapping) const {
    const auto& nodes = structure().nodes();
    std::size_t count = 0;
    for (auto child = index + 1; child < nodes[index].end; child = nodes[child].end) {
      const bool left_out =
          nodes[child].kind == NodeKind::kTensor && !tensors_[nodes[child].leaf].is_valid();
      if (!nodes[child].metadata && !left_out) ++count;
    }
    if (nb::len(mapping) == count) return;
    const std::string path = structure().path_text(index);
    raise(Error{.code = ErrorCode::kUnsupported,
                .message = "cannot load '" + path +
                           "': some of its keys, such as 1 and True, are "
                           "one key in Python; load its items by their own paths",
                .key_path = path});
  }

  const StateDict& state_;
  const TensorObjects& tensors_;
  const ValueObjects& values_;
};

}  // namespace

ValueObjects values_of(const StateDict& state, std::uint32_t node, bool allow_pickle) {
  const auto& nodes = state.structure().nodes();
  ValueObjects values(state.values().size());
  for (std::uint32_t i = node; i < nodes[node].end; ++i) {
    if (nodes[i].kind != NodeKind::kValue) continue;
    values[nodes[i].leaf] =
        object_of(state.values()[nodes[i].leaf], allow_pickle, state.structure().path_text(i));
  }
  return values;
}

nb::object tree_of(const StateDict& state, std::uint32_t node, const TensorObjects& tensors,
                   const ValueObjects& values) {
  return TreeMaker(state, tensors, values).make(node);
}

Status PreparedValues::prepare(const StateDict& state) {
  const nb::gil_scoped_acquire gil;
  try {
    values_ = values_of(state, 0, allow_pickle_);
    // The tree of these with nothing for the tensors, which are not read yet.
    const TensorObjects no_tensors(state.tensors().size(), nb::none());
    (void)tree_of(state, 0, no_tensors, values_);
    return {};
  } catch (nb::python_error& error) {
    pending_.emplace(std::move(error));
    return failure(ErrorCode::kUnsupported, "a plain value cannot be made in Python");
  }
}

void PreparedValues::raise_pending() {
  if (pending_) throw std::exchange(pending_, std::nullopt).value();
}

}  // namespace strandline::python
