#include "format/value_json.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <iterator>

#include "format/base64.h"
#include "format/json_text.h"

namespace strandline::format {
namespace {

bool is_decimal(std::string_view text) {
  if (text.starts_with('-')) text.remove_prefix(1);
  return !text.empty() &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

Status unsupported(std::string_view problem) {
  return failure(ErrorCode::kUnsupported, std::string(problem));
}

class ValueWriter {
 public:
  explicit ValueWriter(std::string& out) : out_(out) {}

  Status write(const Value& value) {
    return std::visit([this](const auto& held) { return write_held(held); }, value.data());
  }

 private:
  Status write_held(Value::None) { return write_bare("null"); }
  Status write_held(bool value) { return write_bare(value ? "true" : "false"); }
  Status write_held(std::int64_t value) {
    append_json_integer(out_, value);
    return {};
  }
  Status write_held(double value) {
    append_number(out_, value);
    return {};
  }
  Status write_held(const std::string& text) {
    if (!is_valid_utf8(text)) {
      return unsupported("it is text that is not valid UTF-8: store it as bytes");
    }
    append_json_string(out_, text);
    return {};
  }
  Status write_held(const Value::BigInteger& value) {
    if (!is_decimal(value.decimal)) return unsupported("it is a BigInteger that is not decimal");
    out_ += R"({"int":")";
    out_ += value.decimal;
    return write_bare("\"}");
  }
  Status write_held(const Value::Bytes& value) {
    out_ += R"({"bytes":")";
    append_base64(out_, value.data);
    return write_bare("\"}");
  }
  Status write_held(const Value::List& list) {
    out_ += R"({"values":)";
    STRANDLINE_RETURN_IF_ERROR(write_list(list));
    return write_bare("}");
  }
  Status write_held(const Value::Tagged& value) {
    out_ += R"({"tagged":{"tag":)";
    STRANDLINE_RETURN_IF_ERROR(write_held(value.tag));
    out_ += R"(,"fields":)";
    STRANDLINE_RETURN_IF_ERROR(write_list(value.fields));
    return write_bare("}}");
  }

  Status write_list(const Value::List& list) {
    if (++depth_ > kValueDepthMax) {
      return unsupported(
          fmt::format("its values are nested more than {} deep: flatten it", kValueDepthMax));
    }
    out_ += '[';
    for (std::size_t i = 0; i < list.size(); ++i) {
      if (i != 0) out_ += ',';
      STRANDLINE_RETURN_IF_ERROR(write(list[i]));
    }
    out_ += ']';
    --depth_;
    return {};
  }

  Status write_bare(std::string_view text) {
    out_ += text;
    return {};
  }

  std::string& out_;
  std::uint32_t depth_ = 0;
};

Result<double> read_bits(const JsonNode& node) {
  constexpr std::size_t kDigits = 16;
  STRANDLINE_ASSIGN_OR_RETURN(const std::string_view text, node.text());
  std::uint64_t bits = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), bits, 16);
  if (text.size() != kDigits || error != std::errc() || end != text.data() + text.size()) {
    return node.corrupt("is not the 16 hexadecimal digits of a double");
  }
  return std::bit_cast<double>(bits);
}

Result<Value> read_big_integer(const JsonNode& node) {
  STRANDLINE_ASSIGN_OR_RETURN(const std::string_view text, node.text());
  if (!is_decimal(text)) return node.corrupt("is not an integer in decimal");
  return Value(Value::BigInteger{std::string(text)});
}

Result<Value> read_bytes(const JsonNode& node) {
  STRANDLINE_ASSIGN_OR_RETURN(const std::string_view text, node.text());
  auto bytes = from_base64(text);
  if (!bytes) return node.corrupt("is not base64");
  return Value(Value::Bytes{*std::move(bytes)});
}

Result<Value::List> read_list(const JsonNode& node, std::uint32_t depth);

Result<Value> read_tagged(const JsonNode& node, std::uint32_t depth) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode tag, members.member("tag"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode fields, members.member("fields"));
  Value::Tagged tagged;
  STRANDLINE_ASSIGN_OR_RETURN(tagged.tag, tag.text());
  STRANDLINE_ASSIGN_OR_RETURN(tagged.fields, read_list(fields, depth));
  return Value(std::move(tagged));
}

// An object with one of the members below. Others are ignored, as everywhere.
Result<Value> read_typed(const JsonNode& node, std::uint32_t depth) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
  std::string_view type;
  for (const std::string_view known : {"int", "double", "bytes", "values", "tagged"}) {
    if (!members.find(known)) continue;
    if (!type.empty()) return node.corrupt("has more than one type");
    type = known;
  }
  if (type.empty()) return node.corrupt("is not a value of a known type");
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode held, members.member(type));
  if (type == "int") return read_big_integer(held);
  if (type == "bytes") return read_bytes(held);
  if (type == "tagged") return read_tagged(held, depth);
  if (type == "values") {
    STRANDLINE_ASSIGN_OR_RETURN(Value::List list, read_list(held, depth));
    return Value(std::move(list));
  }
  STRANDLINE_ASSIGN_OR_RETURN(const double number, read_bits(held));
  return Value(number);
}

Result<Value> read_nested_value(const JsonNode& node, std::uint32_t depth) {
  switch (node.type()) {
    case JsonNode::Type::kNull:
      return Value();
    case JsonNode::Type::kBool: {
      STRANDLINE_ASSIGN_OR_RETURN(const bool value, node.boolean());
      return Value(value);
    }
    case JsonNode::Type::kInteger: {
      STRANDLINE_ASSIGN_OR_RETURN(const std::int64_t value, node.integer());
      return Value(value);
    }
    case JsonNode::Type::kDouble: {
      STRANDLINE_ASSIGN_OR_RETURN(const double value, node.number());
      return Value(value);
    }
    case JsonNode::Type::kText: {
      STRANDLINE_ASSIGN_OR_RETURN(const std::string_view value, node.text());
      return Value(value);
    }
    case JsonNode::Type::kObject:
      return read_typed(node, depth);
    case JsonNode::Type::kUnsigned:
      return node.corrupt("is an integer beyond 64 bits that does not stand as {\"int\"}");
    case JsonNode::Type::kArray:
      break;
  }
  return node.corrupt("is an array, which is no value");
}

Result<Value::List> read_list(const JsonNode& node, std::uint32_t depth) {
  if (depth >= kValueDepthMax) {
    return node.corrupt(fmt::format("is nested more than {} values deep", kValueDepthMax));
  }
  Value::List list;
  STRANDLINE_RETURN_IF_ERROR(node.for_each_item([&](const JsonNode& item, std::size_t) -> Status {
    STRANDLINE_ASSIGN_OR_RETURN(Value value, read_nested_value(item, depth + 1));
    list.push_back(std::move(value));
    return {};
  }));
  return list;
}

}  // namespace

Status append_value(std::string& out, const Value& value) { return ValueWriter(out).write(value); }

Result<Value> read_value(const JsonNode& node) { return read_nested_value(node, 0); }

void append_number(std::string& out, double number) {
  if (std::isfinite(number)) return append_json_double(out, number);
  fmt::format_to(std::back_inserter(out), R"({{"double":"{:016x}"}})",
                 std::bit_cast<std::uint64_t>(number));
}

Result<double> read_number(const JsonNode& node) {
  if (node.type() != JsonNode::Type::kObject) return node.number();
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode bits, members.member("double"));
  return read_bits(bits);
}

}  // namespace strandline::format
