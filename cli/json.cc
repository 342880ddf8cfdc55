#include "json.h"

#include <fmt/format.h>

#include <cmath>
#include <utility>
#include <variant>

#include "text.h"
#include "utf8.h"

namespace strandline::cli {
namespace {

std::string escaped(char32_t code) {
  const auto unit = [](char32_t value) {
    return fmt::format("\\u{:04x}", static_cast<std::uint32_t>(value));
  };
  if (code < 0x10000) return unit(code);
  const char32_t rest = code - 0x10000;
  return unit(0xd800 + (rest >> 10)) + unit(0xdc00 + (rest & 0x3ff));
}

std::string hexadecimal(std::string_view bytes) {
  std::string text;
  for (const char c : bytes) text += fmt::format("{:02x}", static_cast<unsigned char>(c));
  return text;
}

}  // namespace

void JsonWriter::before_value() {
  if (comma_due_) out_ += ", ";
  comma_due_ = true;
}

JsonWriter& JsonWriter::begin_object() {
  before_value();
  out_ += '{';
  comma_due_ = false;
  return *this;
}

JsonWriter& JsonWriter::end_object() {
  out_ += '}';
  comma_due_ = true;
  return *this;
}

JsonWriter& JsonWriter::begin_array() {
  before_value();
  out_ += '[';
  comma_due_ = false;
  return *this;
}

JsonWriter& JsonWriter::end_array() {
  out_ += ']';
  comma_due_ = true;
  return *this;
}

JsonWriter& JsonWriter::key(std::string_view name) {
  text(name);
  out_ += ": ";
  comma_due_ = false;
  return *this;
}

JsonWriter& JsonWriter::text(std::string_view text) {
  before_value();
  out_ += '"';
  while (!text.empty()) {
    const Utf8Character character = take_character(text);
    if (!character.valid) {
      out_ += "\\ufffd";
    } else if (character.code == '"' || character.code == '\\') {
      out_ += '\\';
      out_ += character.bytes;
    } else if (character.code < 0x20 || character.code >= 0x7f) {
      out_ += escaped(character.code);
    } else {
      out_ += character.bytes;
    }
  }
  out_ += '"';
  return *this;
}

JsonWriter& JsonWriter::number(std::int64_t number) {
  before_value();
  out_ += fmt::format("{}", number);
  return *this;
}

JsonWriter& JsonWriter::number(std::uint64_t number) {
  before_value();
  out_ += fmt::format("{}", number);
  return *this;
}

JsonWriter& JsonWriter::number(double number) {
  if (std::isnan(number)) return text("NaN");
  if (std::isinf(number)) return text(number < 0 ? "-Infinity" : "Infinity");
  before_value();
  out_ += fmt::format("{}", number);  // The shortest text that reads back as the same number.
  return *this;
}

JsonWriter& JsonWriter::boolean(bool value) {
  before_value();
  out_ += value ? "true" : "false";
  return *this;
}

JsonWriter& JsonWriter::null() {
  before_value();
  out_ += "null";
  return *this;
}

JsonWriter& JsonWriter::value(const Value& value) {
  if (value.get_if<Value::None>() != nullptr) return null();
  if (const auto* flag = value.get_if<bool>()) return boolean(*flag);
  if (const auto* integer = value.get_if<std::int64_t>()) return number(*integer);
  if (const auto* real = value.get_if<double>()) return number(*real);
  if (const auto* string = value.get_if<std::string>()) return text(*string);
  if (const auto* bytes = value.get_if<Value::Bytes>()) return text(hexadecimal(bytes->data));
  if (const auto* list = value.get_if<Value::List>()) {
    begin_array();
    for (const Value& item : *list) this->value(item);
    return end_array();
  }
  // Integers of any size are JSON too, but few readers keep them whole.
  return text(value.text());
}

std::string JsonWriter::finish() {
  comma_due_ = false;
  return std::exchange(out_, {}) + '\n';
}

void add_info(JsonWriter& json, const CheckpointInfo& info) {
  json.key("step").number(info.step).key("sequence").number(info.sequence).key("parent");
  info.parent ? json.number(*info.parent) : json.null();
  json.key("created_ns").number(info.created_ns).key("created").text(utc_time(info.created_ns));
  json.key("format").begin_object();
  json.key("major").number(std::uint64_t{info.format_major});
  json.key("minor").number(std::uint64_t{info.format_minor}).end_object();
  json.key("bytes").number(info.bytes).key("run").text(info.run);
  json.key("world").number(std::uint64_t{info.world}).key("metrics").begin_object();
  for (const auto& [name, value] : info.metrics) json.key(name).number(value);
  json.end_object();
}

}  // namespace strandline::cli
