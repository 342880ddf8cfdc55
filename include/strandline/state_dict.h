/// @file
/// The state of a job as the engine sees it: a tree of named tensors and plain values.
///
/// A StateDict is what save() takes and what load() gives. Its tree (Structure) is immutable and
/// shared; its tensors are views that borrow memory; its plain values are owned.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "strandline/dtype.h"
#include "strandline/error.h"
#include "strandline/export.h"
#include "strandline/value.h"

namespace strandline::inline v0 {

/// The deepest nesting of containers that a state may have; deeper ones are refused with their key
/// path. Real training states nest fewer than ten; the limit bounds recursion on hostile files.
inline constexpr std::uint32_t kStateDepthMax = 64;

/// Where a tensor's bytes live. The host is kind "host"; other kinds name a registered Device.
struct DeviceId {
  std::string kind = "host";
  int index = 0;
  bool operator==(const DeviceId&) const = default;
};

/// A view of a tensor's elements in somebody else's memory.
///
/// Ownership: borrows; `keep_alive`, where given, keeps the memory alive as long as any copy of
/// the view exists. Thread-safety: thread-compatible.
struct STRANDLINE_EXPORT TensorView {
  std::byte* data = nullptr;  ///< The element at index 0, 0, …; may be null if there is none.
  DType dtype = DType::kU8;
  std::vector<std::uint64_t> shape;         ///< Empty for a 0-d tensor.
  std::vector<std::int64_t> strides_bytes;  ///< One per dimension; 0 expands, negative reverses.
  DeviceId device;
  std::uint64_t stream = 0;                 ///< The producer's stream on `device`; 0 on the host.
  const std::byte* storage_base = nullptr;  ///< Where the memory that `data` lies in begins.
  std::uint64_t storage_bytes = 0;          ///< How much of it there is now.
  bool conjugate = false;                   ///< The values are the conjugates of the bytes.
  bool negative = false;                    ///< The values are the bytes negated.
  bool writable = false;                    ///< Whether restore may write into it.
  std::string framework;                    ///< Who gave it: "torch", "numpy", or empty.
  std::shared_ptr<const void> keep_alive;

  /// The number of elements; 1 for a 0-d tensor. REQUIRES: a shape that passed `check()`.
  [[nodiscard]] std::uint64_t element_count() const;

  /// The bytes that its elements take in row-major order. REQUIRES: as element_count().
  [[nodiscard]] std::uint64_t byte_count() const;

  /// Whether its elements already lie in row-major order without gaps.
  [[nodiscard]] bool is_row_major() const;

  /// The byte range that its elements reach, relative to `data`: [first, second). Empty tensors
  /// reach nothing. REQUIRES: as element_count().
  [[nodiscard]] std::pair<std::int64_t, std::int64_t> reach_bytes() const;

  /// Checks that shape, strides and type fit together, that no size overflows, and that every
  /// element lies inside the storage. Fails with kInvalidArgument otherwise: the storage was freed
  /// or resized, or the view is wrong.
  [[nodiscard]] Status check() const;

  /// A row-major view of `bytes` at `data`; `bytes` must be what `shape` and `dtype` need.
  [[nodiscard]] static TensorView row_major(void* data, DType dtype,
                                            std::vector<std::uint64_t> shape);

  /// A one-dimensional view of a contiguous range (vector, array, span) of numbers. A const range
  /// gives a view that can be saved but not restored into.
  template <typename Range>
  [[nodiscard]] static TensorView of(Range& range) {
    return of(range, {static_cast<std::uint64_t>(std::size(range))});
  }

  /// The same with a shape, whose product must be the range's size.
  template <typename Range>
  [[nodiscard]] static TensorView of(Range& range, std::vector<std::uint64_t> shape);
};

/// The DType of a C++ number type.
template <typename T>
constexpr DType dtype_of();

/// What a node of the tree is.
enum class NodeKind : std::uint8_t {
  kDict,         ///< A mapping with typed keys, in insertion order.
  kOrderedDict,  ///< Python's OrderedDict; may carry a `_metadata` attribute (see Node::metadata).
  kCounter,      ///< Python's collections.Counter.
  kList,
  kTuple,
  kTensor,
  kValue,
};

/// The tree of a state dict without its bytes and plain values: kinds, keys, dtypes, shapes.
///
/// Immutable, shared, thread-safe. Nodes stand in pre-order: node 0 is the root, and the nodes of
/// the subtree of node `i` are [i, nodes()[i].end). Children are visited so:
/// `for (auto child = i + 1; child < nodes()[i].end; child = nodes()[child].end)`.
class STRANDLINE_EXPORT Structure {
 public:
  struct Node {
    NodeKind kind = NodeKind::kDict;
    bool metadata = false;     ///< This is its parent's `_metadata`, not one of its items.
    std::uint32_t parent = 0;  ///< Node index; the root is its own parent.
    std::uint32_t end = 0;     ///< One past the last node of the subtree.
    std::uint32_t leaf = 0;    ///< Index among tensors (kTensor) or plain values (kValue).
    Key key;                   ///< Key in the parent; the index as an integer in lists and tuples.
  };
  struct Tensor {
    DType dtype = DType::kU8;
    std::vector<std::uint64_t> shape;
    std::string framework;
    std::uint32_t node = 0;

    /// The bytes that it takes in row-major order.
    [[nodiscard]] std::uint64_t byte_count() const;
  };

  /// The nodes in pre-order, the tensors in the order of their nodes, and the number of plain
  /// values.
  [[nodiscard]] const std::vector<Node>& nodes() const { return nodes_; }
  [[nodiscard]] const std::vector<Tensor>& tensors() const { return tensors_; }
  [[nodiscard]] std::uint32_t value_count() const { return value_count_; }

  /// Equal for equal structures; differs, as good as surely, for different ones.
  [[nodiscard]] std::uint64_t hash() const { return hash_; }

  /// The keys from the root to a node; and the same as text for people.
  [[nodiscard]] KeyPath path(std::uint32_t node) const;
  [[nodiscard]] std::string path_text(std::uint32_t node) const;

  /// The child of `node` under `key`, if there is one.
  [[nodiscard]] std::optional<std::uint32_t> child(std::uint32_t node, const Key& key) const;

  /// The node at a path given key by key.
  [[nodiscard]] std::optional<std::uint32_t> find(const KeyPath& path) const;

  /// The node at a path as text. At each level an exact key (text, or a number's text) wins over
  /// splitting the text at a dot.
  [[nodiscard]] std::optional<std::uint32_t> find(std::string_view path) const;

 private:
  friend class StateDict;
  friend class StateDictBuilder;
  Structure();  // An empty dict.
  void compute_hash();

  std::vector<Node> nodes_;
  std::vector<Tensor> tensors_;
  std::uint32_t value_count_ = 0;
  std::uint64_t hash_ = 0;
};

/// A tree of named tensors and plain values.
///
/// Thread-safety: thread-compatible. Ownership: owns the values, borrows the tensors' memory (see
/// TensorView::keep_alive). Copies share the structure.
class STRANDLINE_EXPORT StateDict {
 public:
  class Item;
  struct Entry;

  /// An empty dict.
  StateDict();
  /// A dict of the entries: `StateDict{{"weights", TensorView::of(w)}, {"epoch", 3}}`. A problem
  /// (a key given twice, a wrong view) is reported by save(), with the key.
  StateDict(std::initializer_list<Entry> entries);

  StateDict(const StateDict&);
  StateDict& operator=(const StateDict&);
  StateDict(StateDict&&) noexcept;
  StateDict& operator=(StateDict&&) noexcept;
  ~StateDict();

  [[nodiscard]] const Structure& structure() const;
  [[nodiscard]] std::shared_ptr<const Structure> shared_structure() const;

  /// The views, in the order of Structure::tensors().
  [[nodiscard]] const std::vector<TensorView>& tensors() const;
  [[nodiscard]] std::vector<TensorView>& tensors();

  /// The plain values, in the order of the structure's kValue leaves.
  [[nodiscard]] const std::vector<Value>& values() const;
  [[nodiscard]] std::vector<Value>& values();

  /// The plain value, or the tensor, at a path as text (see Structure::find). Fails with kNotFound.
  [[nodiscard]] Result<Value> value(std::string_view path) const;
  [[nodiscard]] Result<TensorView> tensor(std::string_view path) const;

  /// The bytes of all tensors in row-major order, aliases counted each time.
  [[nodiscard]] std::uint64_t byte_count() const;

  /// What was wrong with an initializer list; success for every other StateDict.
  [[nodiscard]] const Status& construction() const;

 private:
  friend class StateDictBuilder;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Builds a StateDict item by item, in order; how adapters and readers make one.
///
/// `begin` and `end` bracket a container; the key of an item in a list or tuple is ignored (it is
/// its index). The root is open from the start. Fails with kInvalidArgument on a key of a wrong
/// type or given twice in one dict, on more than kStateDepthMax levels and on unbalanced calls;
/// the error carries the key path. Thread-safety: single-threaded.
class STRANDLINE_EXPORT StateDictBuilder {
 public:
  /// REQUIRES: a root of kind kDict, kOrderedDict or kCounter.
  explicit StateDictBuilder(NodeKind root = NodeKind::kDict);
  ~StateDictBuilder();
  StateDictBuilder(StateDictBuilder&&) noexcept;
  StateDictBuilder& operator=(StateDictBuilder&&) noexcept;

  [[nodiscard]] Status begin(Key key, NodeKind kind);
  /// Opens the `_metadata` of the open kOrderedDict, itself of kind `kind`.
  [[nodiscard]] Status begin_metadata(NodeKind kind);
  /// Closes the open container.
  [[nodiscard]] Status end();
  /// Adds a leaf to the open container.
  [[nodiscard]] Status tensor(Key key, TensorView view);
  [[nodiscard]] Status value(Key key, Value value);
  /// Adds a whole state dict as one container.
  [[nodiscard]] Status state(Key key, const StateDict& state);

  /// The text of the path to the container now open, with `key` appended; for errors of adapters.
  [[nodiscard]] std::string path_text(const Key& key) const;

  /// The state; the builder is empty afterwards. Fails if a container is still open.
  [[nodiscard]] Result<StateDict> finish();

 private:
  [[nodiscard]] Status add_node(Key key, NodeKind kind, bool metadata);

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// What an entry of an initializer list holds: a tensor, a plain value, or a nested state dict.
class StateDict::Item {
 public:
  Item(TensorView view) : data_(std::move(view)) {}
  Item(StateDict state) : data_(std::make_shared<const StateDict>(std::move(state))) {}
  template <typename T>
  requires std::is_constructible_v<Value, T> Item(T&& value)
      : data_(Value(std::forward<T>(value))) {}

  using Data = std::variant<TensorView, Value, std::shared_ptr<const StateDict>>;
  [[nodiscard]] const Data& data() const { return data_; }

 private:
  Data data_;
};

struct StateDict::Entry {
  Key key;
  Item item;
};

template <typename T>
constexpr DType dtype_of() {
  using U = std::remove_cv_t<T>;
  if constexpr (std::is_same_v<U, bool>) return DType::kBool;
  if constexpr (std::is_same_v<U, float>) return DType::kF32;
  if constexpr (std::is_same_v<U, double>) return DType::kF64;
  if constexpr (std::is_same_v<U, std::byte>) return DType::kU8;
  if constexpr (std::is_integral_v<U> && !std::is_same_v<U, bool>) {
    constexpr bool kSigned = std::is_signed_v<U>;
    if constexpr (sizeof(U) == 1) return kSigned ? DType::kI8 : DType::kU8;
    if constexpr (sizeof(U) == 2) return kSigned ? DType::kI16 : DType::kU16;
    if constexpr (sizeof(U) == 4) return kSigned ? DType::kI32 : DType::kU32;
    if constexpr (sizeof(U) == 8) return kSigned ? DType::kI64 : DType::kU64;
  }
  static_assert(std::is_arithmetic_v<U> || std::is_same_v<U, std::byte>,
                "no element type of safetensors matches this C++ type: use row_major()");
}

template <typename Range>
// NOLINTNEXTLINE(performance-unnecessary-value-param): moved from, which clang-tidy cannot see.
TensorView TensorView::of(Range& range, std::vector<std::uint64_t> shape) {
  using Element = std::remove_reference_t<decltype(*std::data(range))>;
  auto* data = const_cast<std::remove_const_t<Element>*>(std::data(range));
  TensorView view = row_major(data, dtype_of<Element>(), std::move(shape));
  view.storage_bytes = std::size(range) * sizeof(Element);
  view.writable = !std::is_const_v<Element>;
  return view;
}

}  // namespace strandline::inline v0
