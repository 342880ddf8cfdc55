#include "strandline/value.h"

#include <bit>
#include <cstdio>

namespace strandline::inline v0 {
namespace {

constexpr std::size_t kBytesShownMax = 16;  // Enough to recognise a blob in a message.

std::string text_of_bytes(const std::string& data) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "b'";
  for (std::size_t i = 0; i < data.size() && i < kBytesShownMax; ++i) {
    const auto byte = static_cast<unsigned char>(data[i]);
    text += "\\x";
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text + (data.size() > kBytesShownMax ? "…'" : "'");
}

std::string text_of_double(double value) {
  char buffer[32];
  const int length = std::snprintf(buffer, sizeof buffer, "%.17g", value);
  return {buffer, static_cast<std::size_t>(length)};
}

std::string text_of_list(const std::vector<Value>& values) {
  std::string text;
  for (const Value& value : values) {
    if (!text.empty()) text += ", ";
    text += value.text();
  }
  return text;
}

bool identical_lists(const std::vector<Value>& a, const std::vector<Value>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!a[i].identical(b[i])) return false;
  }
  return true;
}

struct Text {
  std::string operator()(Value::None) const { return "None"; }
  std::string operator()(bool value) const { return value ? "True" : "False"; }
  std::string operator()(std::int64_t value) const { return std::to_string(value); }
  std::string operator()(const Value::BigInteger& value) const { return value.decimal; }
  std::string operator()(double value) const { return text_of_double(value); }
  std::string operator()(const std::string& value) const { return "'" + value + "'"; }
  std::string operator()(const Value::Bytes& value) const { return text_of_bytes(value.data); }
  std::string operator()(const Value::List& value) const { return "[" + text_of_list(value) + "]"; }
  std::string operator()(const Value::Tagged& value) const {
    return value.tag + "(" + text_of_list(value.fields) + ")";
  }
};

struct Identical {
  bool operator()(double a, double b) const {
    return std::bit_cast<std::uint64_t>(a) == std::bit_cast<std::uint64_t>(b);
  }
  bool operator()(const Value::List& a, const Value::List& b) const {
    return identical_lists(a, b);
  }
  bool operator()(const Value::Tagged& a, const Value::Tagged& b) const {
    return a.tag == b.tag && identical_lists(a.fields, b.fields);
  }
  template <typename T>
  bool operator()(const T& a, const T& b) const {
    return a == b;
  }
  template <typename T, typename U>
  bool operator()(const T&, const U&) const {
    return false;
  }
};

}  // namespace

bool Value::identical(const Value& other) const {
  return std::visit(Identical{}, data_, other.data_);
}

std::string Value::text() const { return std::visit(Text{}, data_); }

std::string key_path_text(const KeyPath& path) {
  std::string text;
  for (const Key& key : path) {
    if (!text.empty()) text += '.';
    const auto* name = key.get_if<std::string>();
    text += name != nullptr ? *name : key.text();
  }
  return text;
}

}  // namespace strandline::inline v0
