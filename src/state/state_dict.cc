#include "strandline/state_dict.h"

#include <bit>
#include <unordered_set>

#include "base/result_macros.h"

namespace strandline::inline v0 {
namespace {

bool is_container(NodeKind kind) {
  switch (kind) {
    case NodeKind::kDict:
    case NodeKind::kOrderedDict:
    case NodeKind::kCounter:
    case NodeKind::kList:
    case NodeKind::kTuple:
      return true;
    case NodeKind::kTensor:
    case NodeKind::kValue:
      return false;
  }
  return false;
}

bool is_sequence(NodeKind kind) { return kind == NodeKind::kList || kind == NodeKind::kTuple; }

bool is_key(const Value& value) {
  return value.get_if<Value::List>() == nullptr && value.get_if<Value::Tagged>() == nullptr;
}

// FNV-1a over what makes two structures differ; a 64-bit value is enough to key a cache whose
// entries are compared in full where it matters.
class Hasher {
 public:
  void add(std::uint64_t word) {
    for (int shift = 0; shift < 64; shift += 8) add_byte(static_cast<unsigned char>(word >> shift));
  }
  void add(const std::string& text) {
    add(text.size());
    for (const char c : text) add_byte(static_cast<unsigned char>(c));
  }
  void add(const Key& key) {
    add(key.data().index());
    if (const auto* text = key.get_if<std::string>()) return add(*text);
    if (const auto* number = key.get_if<double>())
      return add(std::bit_cast<std::uint64_t>(*number));
    add(key.text());
  }
  [[nodiscard]] std::uint64_t value() const { return hash_; }

 private:
  void add_byte(unsigned char byte) { hash_ = (hash_ ^ byte) * 0x100000001b3ull; }
  std::uint64_t hash_ = 0xcbf29ce484222325ull;
};

// Keys of a dict already seen, told apart by type and by every bit.
std::string key_identity(const Key& key) {
  std::string identity(1, static_cast<char>('a' + key.data().index()));
  if (const auto* text = key.get_if<std::string>()) return identity + *text;
  if (const auto* bytes = key.get_if<Value::Bytes>()) return identity + bytes->data;
  if (const auto* number = key.get_if<double>()) {
    return identity + std::to_string(std::bit_cast<std::uint64_t>(*number));
  }
  return identity + key.text();
}

}  // namespace

Structure::Structure() {
  Node root;
  root.end = 1;
  nodes_.push_back(std::move(root));
}

void Structure::compute_hash() {
  Hasher hasher;
  for (const Node& node : nodes_) {
    hasher.add(static_cast<std::uint64_t>(node.kind) * 2 + (node.metadata ? 1 : 0));
    hasher.add(node.end);
    hasher.add(node.key);
    if (node.kind != NodeKind::kTensor) continue;
    const Tensor& tensor = tensors_[node.leaf];
    hasher.add(static_cast<std::uint64_t>(tensor.dtype));
    hasher.add(tensor.shape.size());
    for (const std::uint64_t extent : tensor.shape) hasher.add(extent);
    hasher.add(tensor.framework);
  }
  hash_ = hasher.value();
}

struct StateDict::Impl {
  std::shared_ptr<const Structure> structure;
  std::vector<TensorView> tensors;
  std::vector<Value> values;
  Status construction;
};

struct StateDictBuilder::Impl {
  struct Open {
    std::uint32_t node = 0;
    std::uint64_t next_index = 0;          // For sequences.
    std::unordered_set<std::string> keys;  // For dicts.
    bool has_metadata = false;
  };
  std::shared_ptr<Structure> structure;
  std::vector<TensorView> tensors;
  std::vector<Value> values;
  std::vector<Open> open;
};

StateDictBuilder::StateDictBuilder(NodeKind root) : impl_(std::make_unique<Impl>()) {
  impl_->structure.reset(new Structure);
  impl_->structure->nodes_.front().kind = root;
  impl_->open.emplace_back();
}

StateDictBuilder::~StateDictBuilder() = default;
StateDictBuilder::StateDictBuilder(StateDictBuilder&&) noexcept = default;
StateDictBuilder& StateDictBuilder::operator=(StateDictBuilder&&) noexcept = default;

std::string StateDictBuilder::path_text(const Key& key) const {
  KeyPath path = impl_->structure->path(impl_->open.back().node);
  path.push_back(key);
  return key_path_text(path);
}

namespace {

Status bad_item(const std::string& path, std::string_view problem) {
  return failure(Error{.code = ErrorCode::kInvalidArgument,
                       .message = "cannot add '" + path + "' to the state: " + std::string(problem),
                       .key_path = path});
}

}  // namespace

Status StateDictBuilder::add_node(Key key, NodeKind kind, bool metadata) {
  Impl::Open& parent = impl_->open.back();
  auto& nodes = impl_->structure->nodes_;
  if (metadata) {
    if (nodes[parent.node].kind != NodeKind::kOrderedDict || parent.has_metadata) {
      return bad_item(path_text(Key("_metadata")), "only an OrderedDict has it, and only once");
    }
    parent.has_metadata = true;
  } else if (is_sequence(nodes[parent.node].kind)) {
    key = Key(parent.next_index++);
  } else if (!is_key(key)) {
    return bad_item(path_text(key), "a list or object cannot be a key");
  } else if (!parent.keys.insert(key_identity(key)).second) {
    return bad_item(path_text(key), "its dict has that key already");
  }
  if (is_container(kind) && impl_->open.size() >= kStateDepthMax) {
    return bad_item(path_text(key), "more than " + std::to_string(kStateDepthMax) +
                                        " containers are nested; flatten the state");
  }
  Structure::Node node;
  node.kind = kind;
  node.metadata = metadata;
  node.parent = parent.node;
  node.end = static_cast<std::uint32_t>(nodes.size()) + 1;
  node.key = std::move(key);
  nodes.push_back(std::move(node));
  return {};
}

Status StateDictBuilder::begin(Key key, NodeKind kind) {
  STRANDLINE_RETURN_IF_ERROR(add_node(std::move(key), kind, false));
  Impl::Open open;
  open.node = static_cast<std::uint32_t>(impl_->structure->nodes_.size()) - 1;
  impl_->open.push_back(std::move(open));
  return {};
}

Status StateDictBuilder::begin_metadata(NodeKind kind) {
  STRANDLINE_RETURN_IF_ERROR(add_node(Key(), kind, true));
  Impl::Open open;
  open.node = static_cast<std::uint32_t>(impl_->structure->nodes_.size()) - 1;
  impl_->open.push_back(std::move(open));
  return {};
}

Status StateDictBuilder::end() {
  if (impl_->open.size() <= 1) {
    return failure(ErrorCode::kInvalidArgument, "cannot end a container: only the root is open");
  }
  auto& nodes = impl_->structure->nodes_;
  nodes[impl_->open.back().node].end = static_cast<std::uint32_t>(nodes.size());
  impl_->open.pop_back();
  return {};
}

Status StateDictBuilder::tensor(Key key, TensorView view) {
  STRANDLINE_RETURN_IF_ERROR(add_node(std::move(key), NodeKind::kTensor, false));
  Structure& structure = *impl_->structure;
  const auto node = static_cast<std::uint32_t>(structure.nodes_.size()) - 1;
  structure.nodes_[node].leaf = static_cast<std::uint32_t>(impl_->tensors.size());
  structure.tensors_.push_back({view.dtype, view.shape, view.framework, node});
  impl_->tensors.push_back(std::move(view));
  return {};
}

Status StateDictBuilder::value(Key key, Value value) {
  STRANDLINE_RETURN_IF_ERROR(add_node(std::move(key), NodeKind::kValue, false));
  impl_->structure->nodes_.back().leaf = impl_->structure->value_count_++;
  impl_->values.push_back(std::move(value));
  return {};
}

Status StateDictBuilder::state(Key key, const StateDict& state) {
  STRANDLINE_RETURN_IF_ERROR(state.construction());
  const std::vector<Structure::Node>& nodes = state.structure().nodes();
  STRANDLINE_RETURN_IF_ERROR(begin(std::move(key), nodes.front().kind));
  std::vector<std::uint32_t> ends;
  for (std::uint32_t i = 1; i < nodes.size(); ++i) {
    for (; !ends.empty() && ends.back() == i; ends.pop_back()) STRANDLINE_RETURN_IF_ERROR(end());
    const Structure::Node& node = nodes[i];
    if (node.kind == NodeKind::kTensor) {
      STRANDLINE_RETURN_IF_ERROR(tensor(node.key, state.tensors()[node.leaf]));
    } else if (node.kind == NodeKind::kValue) {
      STRANDLINE_RETURN_IF_ERROR(value(node.key, state.values()[node.leaf]));
    } else {
      STRANDLINE_RETURN_IF_ERROR(node.metadata ? begin_metadata(node.kind)
                                               : begin(node.key, node.kind));
      ends.push_back(node.end);
    }
  }
  for (; !ends.empty(); ends.pop_back()) STRANDLINE_RETURN_IF_ERROR(end());
  return end();
}

Result<StateDict> StateDictBuilder::finish() {
  if (impl_->open.size() != 1) {
    return failure(ErrorCode::kInvalidArgument,
                   "cannot finish the state: '" + path_text(Key("…")) + "' is still open");
  }
  Structure& structure = *impl_->structure;
  structure.nodes_.front().end = static_cast<std::uint32_t>(structure.nodes_.size());
  structure.compute_hash();
  StateDict state;
  state.impl_->structure = std::move(impl_->structure);
  state.impl_->tensors = std::move(impl_->tensors);
  state.impl_->values = std::move(impl_->values);
  *this = StateDictBuilder();
  return state;
}

StateDict::StateDict() : impl_(std::make_unique<Impl>()) {
  std::shared_ptr<Structure> structure(new Structure);
  structure->compute_hash();
  impl_->structure = std::move(structure);
}

StateDict::StateDict(std::initializer_list<Entry> entries) : StateDict() {
  StateDictBuilder builder;
  for (const Entry& entry : entries) {
    Status added;
    if (const auto* view = std::get_if<TensorView>(&entry.item.data())) {
      added = builder.tensor(entry.key, *view);
    } else if (const auto* value = std::get_if<Value>(&entry.item.data())) {
      added = builder.value(entry.key, *value);
    } else {
      added =
          builder.state(entry.key, *std::get<std::shared_ptr<const StateDict>>(entry.item.data()));
    }
    if (!added) {
      impl_->construction = std::move(added);
      return;
    }
  }
  *this = *builder.finish();
}

StateDict::StateDict(const StateDict& other) : impl_(std::make_unique<Impl>(*other.impl_)) {}
StateDict& StateDict::operator=(const StateDict& other) {
  if (this != &other) *impl_ = *other.impl_;
  return *this;
}
// A moved-from StateDict is an empty dict, so that no call on it can fail.
StateDict::StateDict(StateDict&& other) noexcept : StateDict() { std::swap(impl_, other.impl_); }
StateDict& StateDict::operator=(StateDict&& other) noexcept {
  std::swap(impl_, other.impl_);
  return *this;
}
StateDict::~StateDict() = default;

const Structure& StateDict::structure() const { return *impl_->structure; }
std::shared_ptr<const Structure> StateDict::shared_structure() const { return impl_->structure; }
const std::vector<TensorView>& StateDict::tensors() const { return impl_->tensors; }
std::vector<TensorView>& StateDict::tensors() { return impl_->tensors; }
const std::vector<Value>& StateDict::values() const { return impl_->values; }
std::vector<Value>& StateDict::values() { return impl_->values; }
const Status& StateDict::construction() const { return impl_->construction; }

namespace {

tl::unexpected<Error> no_such_leaf(std::string_view path, std::string_view kind) {
  return failure(
      Error{.code = ErrorCode::kNotFound,
            .message = "the state has no " + std::string(kind) + " at '" + std::string(path) + "'",
            .key_path = std::string(path)});
}

}  // namespace

Result<Value> StateDict::value(std::string_view path) const {
  const auto node = structure().find(path);
  if (!node || structure().nodes()[*node].kind != NodeKind::kValue) {
    return no_such_leaf(path, "plain value");
  }
  return impl_->values[structure().nodes()[*node].leaf];
}

Result<TensorView> StateDict::tensor(std::string_view path) const {
  const auto node = structure().find(path);
  if (!node || structure().nodes()[*node].kind != NodeKind::kTensor) {
    return no_such_leaf(path, "tensor");
  }
  return impl_->tensors[structure().nodes()[*node].leaf];
}

std::uint64_t StateDict::byte_count() const {
  std::uint64_t bytes = 0;
  for (const TensorView& view : impl_->tensors) bytes += view.byte_count();
  return bytes;
}

}  // namespace strandline::inline v0
