// Writes JSON. The text is plain ASCII (everything else is escaped), so that it is as safe in a
// terminal as the tables are; text that is not valid UTF-8 gets U+FFFD in the place of bad bytes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "strandline/checkpoint.h"
#include "strandline/value.h"

namespace strandline::cli {

// REQUIRES: calls that make one well-formed document; inside an object key() comes before each
// value. Thread-safety: single-threaded.
class JsonWriter {
 public:
  JsonWriter& begin_object();
  JsonWriter& end_object();
  JsonWriter& begin_array();
  JsonWriter& end_array();
  JsonWriter& key(std::string_view name);

  JsonWriter& text(std::string_view text);
  JsonWriter& number(std::int64_t number);
  JsonWriter& number(std::uint64_t number);
  // JSON has no NaN or infinity; they become the texts "NaN", "Infinity" and "-Infinity".
  JsonWriter& number(double number);
  JsonWriter& boolean(bool value);
  JsonWriter& null();
  // A plain value as the nearest that JSON has: bytes as hexadecimal text, what only an adapter
  // understands as Value::text().
  JsonWriter& value(const Value& value);

  // The document, with a newline at its end.
  [[nodiscard]] std::string finish();

 private:
  void before_value();

  std::string out_;
  bool comma_due_ = false;
};

// The members of an open object that say what a manifest says about its step, without its files and
// metadata.
void add_info(JsonWriter& json, const CheckpointInfo& info);

}  // namespace strandline::cli
