// Reading JSON that nobody vouches for: bounded depth, no duplicate members, typed access whose
// errors say where. Built on simdjson's DOM.
//
// A JsonNode knows the node that it was found in, so that its errors can name the place, such as
// "manifest.json: tree.dict[3]: …", without a string being built for every node that is fine. A
// node must therefore not outlive the one that it came from; taking children of a temporary does
// not compile. All errors are kCorrupt.
#pragma once

#include <simdjson.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/result_macros.h"
#include "strandline/error.h"

namespace strandline::format {

class JsonNode;
class JsonObject;

// A parsed text. Ownership: copies what it needs of the text and of the name.
class JsonDocument {
 public:
  // Parses a whole text with containers nested at most depth_max deep. `name` says in errors what
  // is being read.
  [[nodiscard]] static Result<JsonDocument> parse(std::string_view name, std::string_view text,
                                                  std::uint32_t depth_max);

  // The outermost value. REQUIRES: the document outlives it and stays where it is.
  [[nodiscard]] JsonNode root() const&;
  [[nodiscard]] JsonNode root() const&& = delete;

 private:
  JsonDocument(std::string_view name, std::unique_ptr<simdjson::dom::parser> parser,
               simdjson::dom::element root)
      : name_(name), parser_(std::move(parser)), root_(root) {}

  std::string name_;
  std::unique_ptr<simdjson::dom::parser> parser_;  // Holds what root_ points into.
  simdjson::dom::element root_;
};

// A value in a document.
class JsonNode {
 public:
  enum class Type : std::uint8_t {
    kNull,
    kBool,
    kInteger,   // Fits a signed 64-bit integer.
    kUnsigned,  // An integer beyond that which fits an unsigned one.
    kDouble,
    kText,
    kArray,
    kObject,
  };
  [[nodiscard]] Type type() const;

  // The value as the type asked for. Integers are never taken from doubles; number() takes any.
  // Text is valid UTF-8 and lives as long as the document.
  [[nodiscard]] Result<bool> boolean() const;
  [[nodiscard]] Result<std::int64_t> integer() const;
  [[nodiscard]] Result<std::uint64_t> unsigned_integer() const;
  [[nodiscard]] Result<double> number() const;
  [[nodiscard]] Result<std::string_view> text() const;

  // The value as an object; fails if a member is there twice.
  [[nodiscard]] Result<JsonObject> object() const&;
  Result<JsonObject> object() const&& = delete;

  // Calls `visit(const JsonNode& item, std::size_t index)`, a Status, for each item of an array,
  // until one fails.
  template <typename Visit>
  [[nodiscard]] Status for_each_item(Visit&& visit) const&;

  // The items of an array of unsigned integers.
  [[nodiscard]] Result<std::vector<std::uint64_t>> unsigned_integers() const;

  // The error that `problem` is at this place.
  [[nodiscard]] tl::unexpected<Error> corrupt(std::string_view problem) const;

  // Where this is, such as "manifest.json: tree.dict[3]".
  [[nodiscard]] std::string place() const;

 private:
  friend class JsonDocument;
  friend class JsonObject;
  JsonNode(const JsonNode* parent, std::string_view name, std::size_t index,
           simdjson::dom::element element)
      : parent_(parent), name_(name), index_(index), element_(element) {}

  const JsonNode* parent_;  // Null for the root.
  std::string_view name_;   // The document's name for the root, the member's in an object.
  std::size_t index_;       // The index in an array; kNoIndex for members and the root.
  simdjson::dom::element element_;

  static constexpr std::size_t kNoIndex = static_cast<std::size_t>(-1);
};

// An object whose members are distinct.
class JsonObject {
 public:
  // The member, or the error that it is missing.
  [[nodiscard]] Result<JsonNode> member(std::string_view name) const;
  [[nodiscard]] std::optional<JsonNode> find(std::string_view name) const;

  // Calls `visit(std::string_view name, const JsonNode& value)`, a Status, for each member in the
  // order of the text, until one fails.
  template <typename Visit>
  [[nodiscard]] Status for_each_member(Visit&& visit) const;

 private:
  friend class JsonNode;
  JsonObject(const JsonNode* node, simdjson::dom::object object) : node_(node), object_(object) {}

  const JsonNode* node_;
  simdjson::dom::object object_;
};

template <typename Visit>
Status JsonNode::for_each_item(Visit&& visit) const& {
  simdjson::dom::array array;
  if (element_.get(array) != simdjson::SUCCESS) return corrupt("is not an array");
  std::size_t index = 0;
  for (const simdjson::dom::element element : array) {
    const JsonNode item(this, {}, index, element);
    STRANDLINE_RETURN_IF_ERROR(visit(item, index));
    ++index;
  }
  return {};
}

template <typename Visit>
Status JsonObject::for_each_member(Visit&& visit) const {
  for (const simdjson::dom::key_value_pair member : object_) {
    const JsonNode value(node_, member.key, JsonNode::kNoIndex, member.value);
    STRANDLINE_RETURN_IF_ERROR(visit(member.key, value));
  }
  return {};
}

}  // namespace strandline::format
