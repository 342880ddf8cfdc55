#include "format/json_reader.h"

#include <gtest/gtest.h>

#include <string>

namespace strandline::format {
namespace {

constexpr std::uint32_t kDepth = 8;

// What goes wrong when every value of a text is visited.
std::string problem_with(std::string_view text) {
  struct Visitor {
    static Status visit(const JsonNode& node) {
      if (node.type() == JsonNode::Type::kText) {
        STRANDLINE_RETURN_IF_ERROR(node.text());
      }
      if (node.type() == JsonNode::Type::kArray) {
        return node.for_each_item([](const JsonNode& item, std::size_t) { return visit(item); });
      }
      if (node.type() != JsonNode::Type::kObject) return {};
      STRANDLINE_ASSIGN_OR_RETURN(const JsonObject object, node.object());
      return object.for_each_member(
          [](std::string_view, const JsonNode& value) { return visit(value); });
    }
  };
  const auto document = JsonDocument::parse("file.json", text, kDepth);
  if (!document) {
    EXPECT_EQ(document.error().code, ErrorCode::kCorrupt);
    return document.error().message;
  }
  const JsonNode root = document->root();
  const Status status = Visitor::visit(root);
  if (status) return "";
  EXPECT_EQ(status.error().code, ErrorCode::kCorrupt);
  return status.error().message;
}

TEST(JsonReader, WhatIsNotJsonIsRefused) {
  for (const std::string_view text : {"",
                                      " ",
                                      "{",
                                      "}",
                                      "{}{}",
                                      "{} x",
                                      "[1,]",
                                      "{\"a\":1,}",
                                      "{a:1}",
                                      "nul",
                                      "01",
                                      "1.",
                                      "+1",
                                      "'a'",
                                      "\"a",
                                      "\"\n\"",
                                      "\"\\x\"",
                                      "NaN",
                                      "Infinity",
                                      "1e999",
                                      "99999999999999999999",
                                      "-9223372036854775809"}) {
    EXPECT_NE(problem_with(text), "") << text;
  }
}

TEST(JsonReader, TextThatIsNotUtf8IsRefused) {
  for (const std::string_view text :
       {"\"\x80\"", "\"\xc0\x80\"", "{\"\xff\":1}", "\"\\ud800\"", "\"\\udc00\"",
        "\"\\udc00\\ud800\"", "{\"\\udfff\":1}", "\"\\ud800x\""}) {
    EXPECT_NE(problem_with(text), "") << text;
  }
  EXPECT_EQ(problem_with("\"\\ud83c\\udf0a\""), "");
}

TEST(JsonReader, NestingIsBounded) {
  const std::string open(kDepth, '[');
  const std::string close(kDepth, ']');
  EXPECT_EQ(problem_with(open + close), "");
  EXPECT_EQ(problem_with(open + "1" + close), "");
  EXPECT_NE(problem_with("[" + open + "1" + close + "]").find("nested"), std::string::npos);
  const std::string deep = std::string(100'000, '[') + std::string(100'000, ']');
  EXPECT_NE(problem_with(deep).find("nested"), std::string::npos);
  EXPECT_NE(problem_with(std::string(100'000, '[')), "");
}

TEST(JsonReader, AMemberGivenTwiceIsRefusedHoweverManyThereAre) {
  EXPECT_NE(problem_with(R"({"a":1,"a":1})").find("\"a\" twice"), std::string::npos);
  EXPECT_NE(problem_with(R"({"a":1,"\u0061":1})"), "");
  EXPECT_NE(problem_with(R"([{"b":{"":1,"":2}}])"), "");
  std::string many = "{";
  for (int i = 0; i < 100; ++i) many += "\"" + std::to_string(i) + "\":1,";
  EXPECT_EQ(problem_with(many + "\"x\":1}"), "");
  EXPECT_NE(problem_with(many + "\"50\":1}").find("\"50\" twice"), std::string::npos);
}

TEST(JsonReader, ErrorsNameThePlace) {
  const auto document =
      JsonDocument::parse("file.json", R"({"tree":{"dict":[1,2,{"a b":"x"}]}})", kDepth);
  const JsonNode root = document->root();
  EXPECT_EQ(root.corrupt("is bad").value().message, "file.json: is bad");
  const auto top = root.object();
  const JsonNode tree = *top->member("tree");
  const auto tree_members = tree.object();
  const JsonNode dict = *tree_members->member("dict");
  EXPECT_EQ(tree_members->member("nothing").error().message,
            "file.json: tree: has no member \"nothing\"");
  std::string message;
  const Status status = dict.for_each_item([&](const JsonNode& item, std::size_t i) -> Status {
    if (i < 2) return {};
    const auto members = item.object();
    const JsonNode leaf = *members->member("a b");
    message = leaf.integer().error().message;
    return item.corrupt("is bad");
  });
  EXPECT_EQ(message, "file.json: tree.dict[2].\"a b\": is not an integer of at most 64 bits");
  EXPECT_EQ(status.error().message, "file.json: tree.dict[2]: is bad");
}

TEST(JsonReader, TypesAreNeverConverted) {
  const auto document = JsonDocument::parse(
      "file.json", R"([null,true,-1,18446744073709551615,1.0,"1",[],{}])", kDepth);
  const JsonNode root = document->root();
  using Type = JsonNode::Type;
  const Type types[] = {Type::kNull,   Type::kBool, Type::kInteger, Type::kUnsigned,
                        Type::kDouble, Type::kText, Type::kArray,   Type::kObject};
  const Status status = root.for_each_item([&](const JsonNode& item, std::size_t i) -> Status {
    EXPECT_EQ(item.type(), types[i]);
    EXPECT_EQ(item.boolean().has_value(), types[i] == Type::kBool);
    EXPECT_EQ(item.integer().has_value(), types[i] == Type::kInteger);
    EXPECT_EQ(item.unsigned_integer().has_value(), types[i] == Type::kUnsigned);
    EXPECT_EQ(item.text().has_value(), types[i] == Type::kText);
    EXPECT_EQ(item.object().has_value(), types[i] == Type::kObject);
    EXPECT_EQ(item.unsigned_integers().has_value(), types[i] == Type::kArray);
    EXPECT_EQ(item.number().has_value(), types[i] == Type::kInteger ||
                                             types[i] == Type::kUnsigned ||
                                             types[i] == Type::kDouble);
    return {};
  });
  EXPECT_TRUE(status);
}

}  // namespace
}  // namespace strandline::format
