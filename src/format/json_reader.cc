#include "format/json_reader.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/json_engine.h"
#include "format/json_text.h"

namespace strandline::format {
namespace {

using simdjson::dom::element_type;

// simdjson counts one level more than there are containers around a value. (It does not count an
// empty container, so that one of those may stand one level deeper.)
constexpr std::uint32_t kSimdjsonExtraDepth = 1;

// Objects of up to this many members are compared pair by pair; larger ones are sorted.
constexpr std::size_t kPairwiseMembersMax = 8;

// The name of a member that is there twice, if there is one.
std::optional<std::string_view> duplicate_of(std::vector<std::string_view>& names) {
  if (names.size() <= kPairwiseMembersMax) {
    for (std::size_t i = 1; i < names.size(); ++i) {
      for (std::size_t k = 0; k < i; ++k) {
        if (names[i] == names[k]) return names[i];
      }
    }
    return std::nullopt;
  }
  std::sort(names.begin(), names.end());
  const auto found = std::adjacent_find(names.begin(), names.end());
  if (found == names.end()) return std::nullopt;
  return *found;
}

// Names come from hostile files: quoted, escaped and cut before they stand in a message.
std::string quoted(std::string_view name) {
  constexpr std::size_t kShownBytesMax = 80;
  std::string text;
  if (!is_valid_utf8(name)) return "(not UTF-8)";
  if (name.size() > kShownBytesMax) {
    std::size_t end = kShownBytesMax;
    while (end > 0 && (static_cast<unsigned char>(name[end]) & 0xc0) == 0x80) --end;
    append_json_string(text, name.substr(0, end));
    return text + "...";
  }
  append_json_string(text, name);
  return text;
}

bool is_plain_word(std::string_view name) {
  constexpr std::size_t kWordBytesMax = 40;
  return !name.empty() && name.size() <= kWordBytesMax &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                  c == '_' || c == '-';
         });
}

}  // namespace

Result<JsonDocument> JsonDocument::parse(std::string_view name, std::string_view text,
                                         std::uint32_t depth_max) {
  base::choose_json_engine();
  auto parser = std::make_unique<simdjson::dom::parser>();
  simdjson::dom::element root;
  simdjson::error_code error = parser->allocate(text.size(), depth_max + kSimdjsonExtraDepth);
  if (error == simdjson::SUCCESS) error = parser->parse(text.data(), text.size()).get(root);
  if (error == simdjson::DEPTH_ERROR) {
    return failure(ErrorCode::kCorrupt,
                   fmt::format("{}: is nested deeper than {} levels", name, depth_max));
  }
  if (error == simdjson::MEMALLOC) {
    return failure(ErrorCode::kMemoryLimit,
                   fmt::format("{}: no memory to parse {} bytes", name, text.size()));
  }
  if (error != simdjson::SUCCESS) {
    return failure(ErrorCode::kCorrupt,
                   fmt::format("{}: is not valid JSON: {}", name, simdjson::error_message(error)));
  }
  return JsonDocument(name, std::move(parser), root);
}

JsonNode JsonDocument::root() const& { return JsonNode(nullptr, name_, JsonNode::kNoIndex, root_); }

JsonNode::Type JsonNode::type() const {
  switch (element_.type()) {
    case element_type::ARRAY:
      return Type::kArray;
    case element_type::OBJECT:
      return Type::kObject;
    case element_type::INT64:
      return Type::kInteger;
    case element_type::UINT64:
      return Type::kUnsigned;
    case element_type::DOUBLE:
      return Type::kDouble;
    case element_type::STRING:
      return Type::kText;
    case element_type::BOOL:
      return Type::kBool;
    case element_type::NULL_VALUE:
      break;
  }
  return Type::kNull;
}

Result<bool> JsonNode::boolean() const {
  bool value = false;
  if (element_.get(value) != simdjson::SUCCESS) return corrupt("is not true or false");
  return value;
}

Result<std::int64_t> JsonNode::integer() const {
  std::int64_t value = 0;
  if (element_.get(value) != simdjson::SUCCESS) {
    return corrupt("is not an integer of at most 64 bits");
  }
  return value;
}

Result<std::uint64_t> JsonNode::unsigned_integer() const {
  std::uint64_t value = 0;
  if (element_.get(value) != simdjson::SUCCESS) {
    return corrupt("is not an unsigned integer of at most 64 bits");
  }
  return value;
}

Result<double> JsonNode::number() const {
  double value = 0;
  if (element_.get(value) != simdjson::SUCCESS) return corrupt("is not a number");
  return value;
}

Result<std::string_view> JsonNode::text() const {
  std::string_view value;
  if (element_.get(value) != simdjson::SUCCESS) return corrupt("is not text");
  // simdjson checks the bytes of the document, but lets an escaped lone surrogate through.
  if (!is_valid_utf8(value)) return corrupt("is not valid UTF-8");
  return value;
}

Result<JsonObject> JsonNode::object() const& {
  simdjson::dom::object object;
  if (element_.get(object) != simdjson::SUCCESS) return corrupt("is not an object");
  std::vector<std::string_view> names;
  for (const simdjson::dom::key_value_pair member : object) {
    if (!is_valid_utf8(member.key)) return corrupt("has a member whose name is not valid UTF-8");
    names.push_back(member.key);
  }
  if (const auto name = duplicate_of(names)) {
    return corrupt(fmt::format("has the member {} twice", quoted(*name)));
  }
  return JsonObject(this, object);
}

Result<std::vector<std::uint64_t>> JsonNode::unsigned_integers() const {
  std::vector<std::uint64_t> numbers;
  STRANDLINE_RETURN_IF_ERROR(for_each_item([&](const JsonNode& item, std::size_t) -> Status {
    STRANDLINE_ASSIGN_OR_RETURN(const std::uint64_t number, item.unsigned_integer());
    numbers.push_back(number);
    return {};
  }));
  return numbers;
}

tl::unexpected<Error> JsonNode::corrupt(std::string_view problem) const {
  return failure(ErrorCode::kCorrupt, fmt::format("{}: {}", place(), problem));
}

std::string JsonNode::place() const {
  std::vector<const JsonNode*> way;  // From this node up to the root.
  for (const JsonNode* node = this; node != nullptr; node = node->parent_) way.push_back(node);
  std::string text(way.back()->name_);
  bool first = true;
  for (auto node = way.rbegin() + 1; node != way.rend(); ++node) {
    if (first) text += ": ";
    if ((*node)->index_ != kNoIndex) {
      text += fmt::format("[{}]", (*node)->index_);
    } else {
      if (!first) text += '.';
      text += is_plain_word((*node)->name_) ? std::string((*node)->name_) : quoted((*node)->name_);
    }
    first = false;
  }
  return text;
}

Result<JsonNode> JsonObject::member(std::string_view name) const {
  auto found = find(name);
  if (!found) return node_->corrupt(fmt::format("has no member {}", quoted(name)));
  return *found;
}

std::optional<JsonNode> JsonObject::find(std::string_view name) const {
  simdjson::dom::element value;
  if (object_.at_key(name).get(value) != simdjson::SUCCESS) return std::nullopt;
  return JsonNode(node_, name, JsonNode::kNoIndex, value);
}

}  // namespace strandline::format
