/// @file
/// Plain values: what a state dict holds besides tensors.
#pragma once

#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "strandline/export.h"

namespace strandline::inline v0 {

/// A plain value, saved and loaded exactly: NaN payloads, -0.0 and integers of any size included.
///
/// Thread-safety: thread-compatible, like a standard container. Owns what it holds.
class STRANDLINE_EXPORT Value {
 public:
  /// The value of Python's `None`.
  struct None {
    bool operator==(const None&) const = default;
  };
  /// An integer outside 64 bits, in decimal with an optional leading '-'.
  struct BigInteger {
    std::string decimal;
    bool operator==(const BigInteger&) const = default;
  };
  /// Bytes, as opposed to text.
  struct Bytes {
    std::string data;
    bool operator==(const Bytes&) const = default;
  };
  /// A value that only an adapter understands, such as `torch.dtype`; the engine keeps it as it is.
  struct Tagged {
    std::string tag;            ///< Names the kind, such as "torch.dtype" or "pickle".
    std::vector<Value> fields;  ///< What the adapter needs to make it again.
  };
  using List = std::vector<Value>;
  using Variant =
      std::variant<None, bool, std::int64_t, BigInteger, double, std::string, Bytes, List, Tagged>;

  Value() = default;
  Value(bool value) : data_(value) {}
  template <std::integral T>
  requires(!std::same_as<T, bool>) Value(T value);
  Value(double value) : data_(value) {}
  Value(const char* text) : data_(std::string(text)) {}
  Value(std::string_view text) : data_(std::string(text)) {}
  Value(std::string text) : data_(std::move(text)) {}
  Value(None) {}
  Value(BigInteger value) : data_(std::move(value)) {}
  Value(Bytes value) : data_(std::move(value)) {}
  Value(List value) : data_(std::move(value)) {}
  Value(Tagged value) : data_(std::move(value)) {}

  [[nodiscard]] const Variant& data() const { return data_; }

  /// The value as a T of the Variant, or null if it holds another type.
  template <typename T>
  [[nodiscard]] const T* get_if() const {
    return std::get_if<T>(&data_);
  }

  /// Whether both are the same to the last bit (NaN equals itself, 0.0 differs from -0.0, and
  /// `true` from 1).
  [[nodiscard]] bool identical(const Value& other) const;

  /// A short text for people, such as `3`, `'adam'` or `torch.dtype('float32')`.
  [[nodiscard]] std::string text() const;

 private:
  Variant data_;
};

template <std::integral T>
requires(!std::same_as<T, bool>) Value::Value(T value) {
  if (std::in_range<std::int64_t>(value)) {
    data_ = static_cast<std::int64_t>(value);
  } else {
    data_ = BigInteger{std::to_string(value)};
  }
}

/// A key of a dict: None, bool, an integer, a double, text or bytes; or the index in a list, as an
/// integer. Keys keep their type: 1, true and "1" are three keys.
using Key = Value;

/// The keys from the root of a state dict to one of its values.
using KeyPath = std::vector<Key>;

/// The path as people write it, such as "optimizer.state.0.exp_avg".
STRANDLINE_EXPORT std::string key_path_text(const KeyPath& path);

}  // namespace strandline::inline v0
