#include "format/manifest.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <bit>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <string>

#include "format/digest.h"
#include "format/value_json.h"
#include "format/version.h"

namespace strandline::format {
namespace {

constexpr std::string_view kTailBegin = R"(,"manifest_digest":")";

std::string read_whole_file(const std::string& name) {
  std::ifstream stream(std::string(STRANDLINE_SOURCE_DIR) + "/" + name, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

// A text with the tail that its body needs, so that it reaches the parser behind the digest.
std::string seal(std::string_view body) {
  return std::string(body) + std::string(kTailBegin) + digest_of(body).hex() + "\"}\n";
}

std::string_view body_of(std::string_view text) { return text.substr(0, text.rfind(kTailBegin)); }

// `text` with its only `from` replaced by `to`, sealed again.
std::string edited(std::string_view text, std::string_view from, std::string_view to) {
  std::string body(body_of(text));
  const std::size_t position = body.find(from);
  if (position == std::string::npos || body.find(from, position + 1) != std::string::npos) {
    ADD_FAILURE() << "not there exactly once: " << from;
    return {};
  }
  return seal(body.replace(position, from.size(), to));
}

testing::AssertionResult refused(std::string_view text, ErrorCode code,
                                 std::string_view reason = "") {
  const auto manifest = parse_manifest(text);
  if (manifest) return testing::AssertionFailure() << "accepted";
  const Error& error = manifest.error();
  if (error.code != code || error.message.find(reason) == std::string::npos) {
    return testing::AssertionFailure() << error_code_name(error.code) << ": " << error.message;
  }
  return testing::AssertionSuccess() << error.message;
}

testing::AssertionResult same(const StateDict& a, const StateDict& b) {
  const auto& nodes = a.structure().nodes();
  const auto& others = b.structure().nodes();
  if (nodes.size() != others.size()) return testing::AssertionFailure() << "other nodes";
  for (std::uint32_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i].kind != others[i].kind || nodes[i].metadata != others[i].metadata ||
        nodes[i].end != others[i].end || nodes[i].leaf != others[i].leaf ||
        !nodes[i].key.identical(others[i].key)) {
      return testing::AssertionFailure() << "node " << a.structure().path_text(i);
    }
  }
  if (a.structure().hash() != b.structure().hash()) return testing::AssertionFailure() << "tensors";
  for (std::size_t i = 0; i < a.values().size(); ++i) {
    if (!a.values()[i].identical(b.values()[i])) {
      return testing::AssertionFailure() << a.values()[i].text() << " / " << b.values()[i].text();
    }
  }
  return testing::AssertionSuccess();
}

TensorView view_of(DType dtype, std::vector<std::uint64_t> shape, std::string framework = "torch") {
  TensorView view = TensorView::row_major(nullptr, dtype, std::move(shape));
  view.framework = std::move(framework);
  return view;
}

// Gives every tensor of the tree a part of its own.
void store_everything(Manifest& manifest) {
  for (const auto& tensor : manifest.tree.structure().tensors()) {
    manifest.entries.push_back(
        {.parts = {{.file = "model-00001-of-00001.safetensors",
                    .name = "t" + std::to_string(manifest.entries.size()),
                    .offset = std::vector<std::uint64_t>(tensor.shape.size(), 0),
                    .shape = tensor.shape}},
         .alias = {}});
  }
}

Manifest manifest_of(StateDict tree) {
  Manifest manifest;
  manifest.info.step = 1200;
  manifest.info.sequence = 13;
  manifest.info.parent = 12;
  manifest.info.run = "0123456789abcdef0123456789abcdef";
  manifest.info.created_ns = 1'753'000'000'000'000'000;
  manifest.info.files = {{.name = "model-00001-of-00001.safetensors",
                          .bytes = 5000,
                          .group = "model",
                          .rank = 0,
                          .header_digest = "99aa06d3014798d86001c324468d497f"},
                         {.name = "rank-00000.json",
                          .bytes = 300,
                          .group = "",
                          .rank = 0,
                          .header_digest = "04c1e57eb1d5e65b9a08d3556ab156f1"}};
  manifest.tree = std::move(tree);
  store_everything(manifest);
  return manifest;
}

const double kNan = std::bit_cast<double>(0x7ff8000000000abcull);

// A value of every type.
std::vector<Value> values_of_every_type() {
  return {Value(),
          true,
          false,
          0,
          std::numeric_limits<std::int64_t>::min(),
          std::numeric_limits<std::uint64_t>::max(),
          Value(Value::BigInteger{"-123456789012345678901234567890"}),
          0.5,
          -0.0,
          1.0,
          kNan,
          std::numeric_limits<double>::infinity(),
          -std::numeric_limits<double>::infinity(),
          "",
          Value(std::string("text \"\\\n\0\x7f \xe2\x82\xac", 14)),
          Value(Value::Bytes{std::string("\0\xff\x80", 3)}),
          Value(Value::List{}),
          Value(Value::List{1, "x", Value::List{Value(), kNan}}),
          Value(Value::Tagged{"torch.Size", {2, 3}}),
          Value(Value::Tagged{"", {Value::List{Value::Tagged{"inner", {}}}}})};
}

// Everything that a manifest can hold, in one.
Manifest full_manifest() {
  StateDictBuilder builder;
  EXPECT_TRUE(builder.begin("model", NodeKind::kOrderedDict));
  EXPECT_TRUE(builder.tensor("embed.weight", view_of(DType::kBF16, {4, 3})));
  EXPECT_TRUE(builder.tensor("head.weight", view_of(DType::kBF16, {4, 3})));
  EXPECT_TRUE(builder.tensor("row", view_of(DType::kU8, {6}, "")));
  EXPECT_TRUE(builder.begin_metadata(NodeKind::kDict));
  EXPECT_TRUE(builder.begin("", NodeKind::kDict));
  EXPECT_TRUE(builder.value("version", 1));
  EXPECT_TRUE(builder.end());
  EXPECT_TRUE(builder.end());
  EXPECT_TRUE(builder.end());
  EXPECT_TRUE(builder.begin("optimizer", NodeKind::kDict));
  EXPECT_TRUE(builder.begin("state", NodeKind::kDict));
  EXPECT_TRUE(builder.tensor(0, view_of(DType::kF32, {}, "numpy")));
  EXPECT_TRUE(builder.end());
  EXPECT_TRUE(builder.begin("betas", NodeKind::kTuple));
  EXPECT_TRUE(builder.value({}, 0.9));
  EXPECT_TRUE(builder.value({}, 0.999));
  EXPECT_TRUE(builder.end());
  EXPECT_TRUE(builder.begin("empty", NodeKind::kList));
  EXPECT_TRUE(builder.end());
  EXPECT_TRUE(builder.end());
  EXPECT_TRUE(builder.begin("counts", NodeKind::kCounter));
  EXPECT_TRUE(builder.value(3, 2));
  EXPECT_TRUE(builder.end());
  EXPECT_TRUE(builder.begin("values", NodeKind::kList));
  for (const Value& value : values_of_every_type()) EXPECT_TRUE(builder.value({}, value));
  EXPECT_TRUE(builder.end());
  EXPECT_TRUE(builder.begin("keys", NodeKind::kDict));
  for (const Value& value : values_of_every_type()) {
    if (value.get_if<Value::List>() || value.get_if<Value::Tagged>()) continue;
    EXPECT_TRUE(builder.value(value, true));
  }
  EXPECT_TRUE(builder.end());
  Manifest manifest = manifest_of(*builder.finish());
  manifest.entries[1] = {.parts = {}, .alias = TensorAlias{.tensor = 0, .offset_bytes = 0}};
  manifest.entries[2] = {.parts = {}, .alias = TensorAlias{.tensor = 0, .offset_bytes = 6}};
  manifest.info.metrics = {{"loss", 0.25}, {"accuracy", kNan}};
  manifest.info.metadata = StateDict{{"note", "first"}, {"versions", StateDict{{"torch", "2.13"}}}};
  return manifest;
}

std::string full_text() { return *write_manifest(full_manifest()); }

void expect_same(const Manifest& a, const Manifest& b) {
  EXPECT_EQ(a.info.step, b.info.step);
  EXPECT_EQ(a.info.sequence, b.info.sequence);
  EXPECT_EQ(a.info.parent, b.info.parent);
  EXPECT_EQ(a.info.run, b.info.run);
  EXPECT_EQ(a.info.world, b.info.world);
  EXPECT_EQ(a.info.created_ns, b.info.created_ns);
  EXPECT_TRUE(same(a.info.metadata, b.info.metadata));
  ASSERT_EQ(a.info.metrics.size(), b.info.metrics.size());
  for (const auto& [name, number] : a.info.metrics) {
    EXPECT_TRUE(Value(number).identical(Value(b.info.metrics.at(name)))) << name;
  }
  ASSERT_EQ(a.info.files.size(), b.info.files.size());
  for (std::size_t i = 0; i < a.info.files.size(); ++i) {
    EXPECT_EQ(a.info.files[i].name, b.info.files[i].name);
    EXPECT_EQ(a.info.files[i].bytes, b.info.files[i].bytes);
    EXPECT_EQ(a.info.files[i].group, b.info.files[i].group);
    EXPECT_EQ(a.info.files[i].rank, b.info.files[i].rank);
    EXPECT_EQ(a.info.files[i].header_digest, b.info.files[i].header_digest);
  }
  EXPECT_TRUE(same(a.tree, b.tree));
  ASSERT_EQ(a.entries.size(), b.entries.size());
  for (std::size_t i = 0; i < a.entries.size(); ++i) {
    ASSERT_EQ(a.entries[i].parts.size(), b.entries[i].parts.size());
    ASSERT_EQ(a.entries[i].alias.has_value(), b.entries[i].alias.has_value());
    if (a.entries[i].alias) {
      EXPECT_EQ(a.entries[i].alias->tensor, b.entries[i].alias->tensor);
      EXPECT_EQ(a.entries[i].alias->offset_bytes, b.entries[i].alias->offset_bytes);
    } else {
      EXPECT_EQ(a.entries[i].parts[0].file, b.entries[i].parts[0].file);
      EXPECT_EQ(a.entries[i].parts[0].name, b.entries[i].parts[0].name);
    }
  }
}

TEST(Manifest, EverythingRoundTrips) {
  const Manifest manifest = full_manifest();
  const auto text = write_manifest(manifest);
  ASSERT_TRUE(text) << text.error().message;
  const auto parsed = parse_manifest(*text);
  ASSERT_TRUE(parsed) << parsed.error().message;
  expect_same(manifest, *parsed);
  EXPECT_EQ(parsed->info.format_major, kFormatMajor);
  EXPECT_EQ(parsed->info.format_minor, kFormatMinor);
  EXPECT_EQ(parsed->tree.tensors()[0].data, nullptr);
  EXPECT_FALSE(parsed->tree.tensors()[0].writable);
  EXPECT_EQ(*write_manifest(*parsed), *text);
}

TEST(Manifest, AnEmptyStateRoundTrips) {
  Manifest manifest = manifest_of(StateDict());
  manifest.info.parent.reset();
  const auto parsed = parse_manifest(*write_manifest(manifest));
  ASSERT_TRUE(parsed) << parsed.error().message;
  expect_same(manifest, *parsed);
}

// The golden file is what version 1 wrote. If this fails, the format has changed: readers of files
// that are out there must be kept, and the minor or major version raised.
TEST(Manifest, TheBytesOfVersion1StayWhatTheyAre) {
  EXPECT_EQ(full_text(), read_whole_file("tests/golden/manifest_v1.json"));
}

TEST(Manifest, TheExampleInTheDocumentationParses) {
  const std::string page = read_whole_file("docs/format.md");
  const std::string_view fence = "```json manifest.json\n";
  const std::size_t begin = page.find(fence);
  ASSERT_NE(begin, std::string::npos);
  const std::size_t end = page.find("```\n", begin + fence.size());
  const std::string example = page.substr(begin + fence.size(), end - begin - fence.size());
  const auto manifest = parse_manifest(example);
  ASSERT_TRUE(manifest) << manifest.error().message << "\nthe digest of its body is "
                        << digest_of(body_of(example)).hex();
  EXPECT_EQ(manifest->info.step, 1200);
  EXPECT_EQ(manifest->tree.structure().tensors().size(), 3u);
}

TEST(Manifest, EverySingleBitFlipIsFound) {
  const std::string text = full_text();
  for (std::size_t i = 0; i < text.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string damaged = text;
      damaged[i] = static_cast<char>(damaged[i] ^ (1 << bit));
      EXPECT_TRUE(refused(damaged, ErrorCode::kCorrupt)) << "byte " << i << " bit " << bit;
    }
  }
}

TEST(Manifest, EveryTruncationAndAnythingBehindIsFound) {
  const std::string text = full_text();
  for (std::size_t size = 0; size < text.size(); ++size) {
    EXPECT_TRUE(refused(text.substr(0, size), ErrorCode::kCorrupt)) << size;
  }
  EXPECT_TRUE(refused(text + "\n", ErrorCode::kCorrupt));
  EXPECT_TRUE(refused(text + text, ErrorCode::kCorrupt));
}

TEST(Manifest, OneThatIsTooLargeIsNeitherReadNorWritten) {
  std::string text = full_text();
  text.insert(1, std::string(kManifestBytesMax - text.size(), ' '));
  EXPECT_TRUE(parse_manifest(seal(body_of(text))));
  text.insert(1, " ");
  EXPECT_TRUE(refused(seal(body_of(text)), ErrorCode::kCorrupt, "at most"));

  const Manifest large =
      manifest_of(StateDict{{"blob", Value(Value::Bytes{std::string(kManifestBytesMax, 'x')})}});
  const auto written = write_manifest(large);
  ASSERT_FALSE(written);
  EXPECT_EQ(written.error().code, ErrorCode::kUnsupported);
}

TEST(Manifest, UnknownMembersAndHigherMinorVersionsAreRead) {
  const std::string text = full_text();
  const std::pair<std::string_view, std::string_view> edits[] = {
      {R"("minor":0)", R"("minor":7,"new":[1])"},
      {R"(,"run":)", R"(,"new":{"deep":[{"er":null}]},"run":)"},
      {R"("chunk_bytes":)", R"("new":0,"chunk_bytes":)"},
      {R"({"name":"rank-00000.json")", R"({"new":0,"name":"rank-00000.json")"},
      {R"(["optimizer",{)", R"(["optimizer",{"new":0,)"},
      {R"({"dtype":"F32")", R"({"new":0,"dtype":"F32")"},
      {R"("offset_bytes":6)", R"("offset_bytes":6,"new":0)"},
      {R"({"counter":)", R"({"metadata":1,"counter":)"},
      {R"("name":"t0")", R"("new":0,"name":"t0")"},
  };
  for (const auto& [from, to] : edits) {
    const auto manifest = parse_manifest(edited(text, from, to));
    ASSERT_TRUE(manifest) << to << ": " << manifest.error().message;
    expect_same(full_manifest(), *manifest);
  }
  EXPECT_EQ(parse_manifest(edited(text, R"("minor":0)", R"("minor":7)"))->info.format_minor, 7u);
}

TEST(Manifest, WhatANewerVersionNeedsIsNamed) {
  const std::string text = full_text();
  const auto unsupported = [&](std::string_view from, std::string_view to,
                               std::string_view reason) {
    EXPECT_TRUE(refused(edited(text, from, to), ErrorCode::kUnsupported, reason)) << to;
  };
  unsupported(R"("major":1)", R"("major":2)", "version 2.0");
  unsupported(R"("major":1)", R"("major":0)", "version 0.0");
  unsupported(R"("requires":[])", R"("requires":["sharded tensors"])", "'sharded tensors'");
  unsupported(R"("algorithm":"xxh3-128")", R"("algorithm":"blake3")", "'blake3'");
  unsupported(R"("chunk_bytes":262144)", R"("chunk_bytes":1)", "262144");
  unsupported(R"("name":"t0","offset":[0,0])", R"("name":"t0","offset":[0,1])", "pieces");
  unsupported(R"("name":"t0","offset":[0,0],"shape":[4,3])",
              R"("name":"t0","offset":[0,0],"shape":[2,3])", "pieces");
  const std::string part = R"({"file":"model-00001-of-00001.safetensors","name":"t0",)"
                           R"("offset":[0,0],"shape":[4,3]})";
  unsupported(part, part + "," + part, "pieces");
  // The version is looked at before everything else.
  EXPECT_TRUE(
      refused(seal(R"({"format":{"major":2,"minor":0,"requires":[]})"), ErrorCode::kUnsupported));
}

TEST(Manifest, DamageInTheMembersInFrontIsRefused) {
  const std::string text = full_text();
  const auto corrupt = [&](std::string_view from, std::string_view to, std::string_view reason) {
    EXPECT_TRUE(refused(edited(text, from, to), ErrorCode::kCorrupt, reason)) << to;
  };
  corrupt(R"("major":1)", R"("major":"1")", "format.major");
  corrupt(R"("requires":[])", R"("requires":{})", "format.requires");
  corrupt(R"("step":1200)", R"("step":-1)", "step: is negative");
  corrupt(R"("step":1200)", R"("step":1200.0)", "step:");
  corrupt(R"("step":1200)", R"("step":9223372036854775808)", "step:");
  corrupt(R"("step":1200)", R"("steps":1200)", R"(no member "step")");
  corrupt(R"("step":1200)", R"("step":1200,"step":1200)", "twice");
  corrupt(R"("sequence":13)", R"("sequence":0)", "sequence:");
  corrupt(R"("parent":12)", R"("parent":13)", "parent:");
  corrupt(R"("parent":12)", R"("parent":-1)", "parent:");
  corrupt(R"("world":1)", R"("world":0)", "world:");
  corrupt(R"("world":1)", R"("world":4294967296)", "world:");
  corrupt(R"("run":"0123)", "\"run\":\"\xff", "not valid JSON");
  corrupt(R"("loss":0.25)", R"("loss":"0.25")", "metrics.loss");
  corrupt(R"("loss":0.25)", R"("loss":{"double":"7ff8"})", "metrics.loss.double");
  corrupt(R"("loss":0.25)", R"("accuracy":0.25)", "twice");
  corrupt(R"("note","first")", R"("note",{"tensor":{}})", "tensor, which metadata cannot hold");
  corrupt(R"("note","first")", R"("versions","first")", "metadata");
}

TEST(Manifest, FileListsThatLieAreRefused) {
  const std::string text = full_text();
  const auto corrupt = [&](std::string_view to, std::string_view reason) {
    EXPECT_TRUE(
        refused(edited(text, R"("name":"rank-00000.json","bytes":300,"group":"","rank":0)", to),
                ErrorCode::kCorrupt, reason))
        << to;
  };
  for (const std::string_view name : {"", ".", "..", "../rank-00000.json", "/etc/passwd", "a/b",
                                      ".hidden", "a\\u0000", "caf\xc3\xa9", "manifest.json"}) {
    corrupt(R"("name":")" + std::string(name) + R"(","bytes":300,"group":"","rank":0)",
            "files[1].name: is no name");
  }
  corrupt(R"("name":"model-00001-of-00001.safetensors","bytes":300,"group":"","rank":0)", "twice");
  corrupt(R"("name":"rank-00000.json","bytes":-300,"group":"","rank":0)", "files[1].bytes");
  corrupt(R"("name":"rank-00000.json","bytes":18446744073709551615,"group":"","rank":0)",
          "overflow");
  corrupt(R"("name":"rank-00000.json","bytes":300,"group":"","rank":1)", "files[1].rank");
  corrupt(R"("name":"rank-00000.json","bytes":300,"group":0,"rank":0)", "files[1].group");
  EXPECT_TRUE(
      refused(edited(text, "99aa06d3014798d86001c324468d497f", "99AA06D3014798d86001c324468d497f"),
              ErrorCode::kCorrupt, "files[0].header_digest"));
}

// A manifest whose tree is this JSON.
std::string with_tree(std::string_view tree) {
  const std::string text = *write_manifest(manifest_of(StateDict()));
  return edited(text, R"("tree":{"dict":[]})", R"("tree":)" + std::string(tree));
}

TEST(Manifest, TreesThatAreNoneAreRefused) {
  EXPECT_TRUE(parse_manifest(with_tree(R"({"counter":[]})")));
  for (const std::string_view tree : {"null",
                                      "1",
                                      "[]",
                                      "{}",
                                      R"({"list":[]})",
                                      R"({"tuple":[]})",
                                      R"({"dict":{}})",
                                      R"({"dict":[1]})",
                                      R"({"dict":[[]]})",
                                      R"({"dict":[["a"]]})",
                                      R"({"dict":[["a",1,2]]})",
                                      R"({"dict":[["a",1],["a",2]]})",
                                      R"({"dict":[["a",[]]]})",
                                      R"({"dict":[["a",{}]]})",
                                      R"({"dict":[["a",{"unknown":1}]]})",
                                      R"({"dict":[["a",{"dict":[],"list":[]}]]})",
                                      R"({"dict":[["a",{"int":"1","double":"0000000000000000"}]]})",
                                      R"({"dict":[["a",{"dict":[],"tensor":{}}]]})",
                                      R"({"dict":[["a",{"int":1}]]})",
                                      R"({"dict":[["a",{"int":""}]]})",
                                      R"({"dict":[["a",{"int":"-"}]]})",
                                      R"({"dict":[["a",{"int":"1e5"}]]})",
                                      R"({"dict":[["a",{"double":"7ff"}]]})",
                                      R"({"dict":[["a",{"double":"0x7ff80000000000"}]]})",
                                      R"({"dict":[["a",{"bytes":"A"}]]})",
                                      R"({"dict":[["a",{"values":1}]]})",
                                      R"({"dict":[["a",{"values":[{"dict":[]}]}]]})",
                                      R"({"dict":[["a",{"values":[[]]}]]})",
                                      R"({"dict":[["a",{"tagged":{"tag":"x"}}]]})",
                                      R"({"dict":[["a",{"tagged":{"tag":1,"fields":[]}}]]})",
                                      R"({"dict":[["a",18446744073709551615]]})",
                                      R"({"dict":[[{"values":[]},1]]})",
                                      R"({"dict":[[["a"],1]]})",
                                      R"({"dict":[["a","\ud800"]]})",
                                      R"({"ordered_dict":[],"metadata":1})",
                                      R"({"ordered_dict":[],"metadata":{"int":"1"}})"}) {
    EXPECT_TRUE(refused(with_tree(tree), ErrorCode::kCorrupt, "manifest.json: ")) << tree;
  }
  EXPECT_TRUE(refused(with_tree(R"({"dict":[["a",{"list":[1,{"int":"x"}]}]]})"),
                      ErrorCode::kCorrupt,
                      "manifest.json: tree.dict[0][1].list[1].int: is not an integer"));
}

TEST(Manifest, TensorsThatLieAreRefused) {
  const auto corrupt = [](std::string_view body, std::string_view reason) {
    const std::string tree = R"({"dict":[["a",{"tensor":{)" + std::string(body) + "}}]]}";
    EXPECT_TRUE(refused(with_tree(tree), ErrorCode::kCorrupt, reason)) << body;
  };
  const std::string file = "model-00001-of-00001.safetensors";
  const auto part = [&](std::string_view shape) {
    return R"("parts":[{"file":")" + file + R"(","name":"x","offset":[0],"shape":)" +
           std::string(shape) + "}]";
  };
  EXPECT_TRUE(parse_manifest(
      with_tree(R"({"dict":[["a",{"tensor":{"dtype":"F32","shape":[2],)" + part("[2]") + "}}]]}")));
  corrupt(R"("shape":[2],)" + part("[2]"), "dtype");
  corrupt(R"("dtype":"F33","shape":[2],)" + part("[2]"), "dtype");
  corrupt(R"("dtype":"F32","shape":[-2],)" + part("[2]"), "shape[0]");
  corrupt(R"("dtype":"F32","shape":[2.0],)" + part("[2]"), "shape[0]");
  corrupt(R"("dtype":"F32","shape":[9223372036854775808],)" + part("[2]"), "overflows");
  corrupt(R"("dtype":"F4","shape":[1],)" + part("[1]"), "whole bytes");
  corrupt(R"("dtype":"F32","shape":[2])", "parts");
  corrupt(R"("dtype":"F32","shape":[2],"parts":[])", "nowhere");
  corrupt(R"("dtype":"F32","shape":[2],"framework":1,)" + part("[2]"), "framework");
  corrupt(R"("dtype":"F32","shape":[2],)"
          R"("parts":[{"file":"b.safetensors","name":"x","offset":[0],"shape":[2]}])",
          "not listed");
  corrupt(R"("dtype":"F32","shape":[2],"parts":[{"file":")" + file +
              R"(","name":"\u0000","offset":[0],"shape":[2]}])",
          "NUL");
}

TEST(Manifest, AliasesMustLieInsideATensor) {
  const std::string text = full_text();
  const auto alias = [&](std::string_view path, std::string_view offset) {
    return edited(
        text, R"("alias_of":["model","embed.weight"],"offset_bytes":6)",
        R"("alias_of":)" + std::string(path) + R"(,"offset_bytes":)" + std::string(offset));
  };
  const std::string_view target = R"(["model","embed.weight"])";
  EXPECT_EQ(parse_manifest(alias(target, "18"))->entries[2].alias->offset_bytes, 18u);
  EXPECT_TRUE(refused(alias(target, "19"), ErrorCode::kCorrupt, "'model.row' reaches beyond"));
  EXPECT_TRUE(refused(alias(target, "18446744073709551615"), ErrorCode::kCorrupt, "beyond"));
  EXPECT_TRUE(refused(alias(target, "-1"), ErrorCode::kCorrupt, "offset_bytes"));
  for (const std::string_view path :
       {"[]", R"(["model"])", R"(["model","row"])", R"(["model","head.weight"])",
        R"(["model","nothing"])", R"(["values",0])", R"(["model","embed","weight"])",
        R"(["model",{"metadata":true}])"}) {
    EXPECT_TRUE(refused(alias(path, "0"), ErrorCode::kCorrupt, "'model.row' is of")) << path;
  }
  for (const std::string_view path : {"1", R"("model")", "[[]]", R"([{"unknown":1}])"}) {
    EXPECT_TRUE(refused(alias(path, "0"), ErrorCode::kCorrupt, "alias_of")) << path;
  }
  // Keys in a path are typed.
  EXPECT_TRUE(
      parse_manifest(alias(R"(["optimizer","state",0])", "0")).error().message.find("beyond") !=
      std::string::npos);
  EXPECT_TRUE(refused(alias(R"(["optimizer","state","0"])", "0"), ErrorCode::kCorrupt, "is of"));
  // Elements of more than a byte must be aligned.
  EXPECT_TRUE(refused(edited(text, R"("alias_of":["model","embed.weight"],"offset_bytes":0)",
                             R"("alias_of":["model","embed.weight"],"offset_bytes":1)"),
                      ErrorCode::kCorrupt, "beyond"));
  const auto odd = edited(text, R"({"alias":{"dtype":"U8","shape":[6])",
                          R"({"alias":{"dtype":"BF16","shape":[3])");
  EXPECT_TRUE(parse_manifest(odd));
  EXPECT_TRUE(refused(edited(odd, R"("offset_bytes":6)", R"("offset_bytes":7)"),
                      ErrorCode::kCorrupt, "inside an element"));
}

TEST(Manifest, AnAliasMayStandBeforeItsTensorAndInTheMetadataOfAnOrderedDict) {
  StateDictBuilder builder;
  ASSERT_TRUE(builder.tensor("alias", view_of(DType::kU8, {2})));
  ASSERT_TRUE(builder.begin("model", NodeKind::kOrderedDict));
  ASSERT_TRUE(builder.tensor("_metadata", view_of(DType::kU8, {1})));
  ASSERT_TRUE(builder.begin_metadata(NodeKind::kList));
  ASSERT_TRUE(builder.tensor({}, view_of(DType::kU8, {3})));
  ASSERT_TRUE(builder.end());
  ASSERT_TRUE(builder.end());
  Manifest manifest = manifest_of(*builder.finish());
  manifest.entries[0] = {.parts = {}, .alias = TensorAlias{.tensor = 2, .offset_bytes = 1}};
  const auto parsed = parse_manifest(*write_manifest(manifest));
  ASSERT_TRUE(parsed) << parsed.error().message;
  expect_same(manifest, *parsed);
}

// A value of lists nested `depth` deep.
Value nested_value(std::uint32_t depth) {
  Value value = 1;
  for (std::uint32_t i = 0; i < depth; ++i) value = Value(Value::Tagged{"t", {std::move(value)}});
  return value;
}

TEST(Manifest, TheDeepestStateRoundTripsAndDeeperOnesAreRefused) {
  StateDictBuilder builder;
  for (std::uint32_t i = 1; i < kStateDepthMax; ++i) {
    ASSERT_TRUE(builder.begin("k", NodeKind::kDict));
  }
  ASSERT_TRUE(builder.value("k", nested_value(kValueDepthMax)));
  ASSERT_TRUE(builder.tensor(Value::BigInteger{"1"}, view_of(DType::kU8, {1})));
  for (std::uint32_t i = 1; i < kStateDepthMax; ++i) ASSERT_TRUE(builder.end());
  const Manifest manifest = manifest_of(*builder.finish());
  const auto parsed = parse_manifest(*write_manifest(manifest));
  ASSERT_TRUE(parsed) << parsed.error().message;
  expect_same(manifest, *parsed);

  const auto tree = [](std::uint32_t depth) {
    std::string text;
    for (std::uint32_t i = 0; i < depth; ++i) text += R"({"dict":[[0,)";
    text += "1";
    for (std::uint32_t i = 0; i < depth; ++i) text += "]]}";
    return text;
  };
  EXPECT_TRUE(parse_manifest(with_tree(tree(kStateDepthMax))));
  EXPECT_TRUE(refused(with_tree(tree(kStateDepthMax + 1)), ErrorCode::kCorrupt, "nested"));
  EXPECT_TRUE(refused(with_tree(tree(100'000)), ErrorCode::kCorrupt, "nested"));
  const auto values = [](std::uint32_t depth) {
    std::string text = R"({"dict":[[0,)";
    for (std::uint32_t i = 0; i < depth; ++i) text += R"({"values":[)";
    for (std::uint32_t i = 0; i < depth; ++i) text += "]}";
    return text + "]]}";
  };
  EXPECT_TRUE(parse_manifest(with_tree(values(kValueDepthMax))));
  EXPECT_TRUE(refused(with_tree(values(kValueDepthMax + 1)), ErrorCode::kCorrupt, "nested"));
  EXPECT_TRUE(refused(with_tree(values(100'000)), ErrorCode::kCorrupt, "nested"));
}

TEST(Manifest, WhatCouldNotBeReadBackIsNotWritten) {
  const auto refuses = [](const Manifest& manifest, std::string_view key_path) {
    const auto text = write_manifest(manifest);
    ASSERT_FALSE(text);
    EXPECT_EQ(text.error().code, ErrorCode::kUnsupported);
    EXPECT_EQ(text.error().key_path, key_path) << text.error().message;
  };
  refuses(manifest_of(StateDict{{"a", StateDict{{"b", "\xff"}}}}), "a.b");
  refuses(manifest_of(StateDict{{"a", StateDict{{"\xff", 1}}}}), "a.\xff");
  refuses(manifest_of(StateDict{{"a", Value::BigInteger{"1.5"}}}), "a");
  refuses(manifest_of(StateDict{{"a", nested_value(kValueDepthMax + 1)}}), "a");
  refuses(manifest_of(StateDict{{"a", Value(Value::Tagged{"\xff", {}})}}), "a");
  Manifest manifest = manifest_of(StateDict());
  manifest.info.metadata = StateDict{{"m", view_of(DType::kU8, {1})}};
  refuses(manifest, "m");
  manifest.info.metadata = StateDict{{"m", "\xff"}};
  refuses(manifest, "m");
  manifest = manifest_of(StateDict());
  manifest.info.metrics["\xff"] = 1;
  refuses(manifest, "");
}

TEST(Manifest, ManyAliasesAndWideDictsTakeNoQuadraticTime) {
  constexpr std::uint32_t kCount = 100'000;
  StateDictBuilder builder;
  for (std::uint32_t i = 0; i < kCount; ++i) {
    ASSERT_TRUE(builder.tensor("layer." + std::to_string(i), view_of(DType::kF32, {8})));
  }
  Manifest manifest = manifest_of(*builder.finish());
  for (std::uint32_t i = kCount / 2; i < kCount; ++i) {
    manifest.entries[i] = {.parts = {},
                           .alias = TensorAlias{.tensor = i - kCount / 2, .offset_bytes = 0}};
  }
  const auto parsed = parse_manifest(*write_manifest(manifest));
  ASSERT_TRUE(parsed) << parsed.error().message;
  EXPECT_EQ(parsed->entries[kCount - 1].alias->tensor, kCount / 2 - 1);
}

// ---- Any state at all ----

rc::Gen<std::string> any_text() {
  const auto piece = rc::gen::element<std::string>(
      "a", "\"", "\\", "\n", std::string(1, '\0'), "\x7f", "\xc3\xa9", "\xe2\x82\xac",
      "\xf0\x9f\x8c\x8a", ",\"manifest_digest\":\"", "}");
  return rc::gen::map(rc::gen::container<std::vector<std::string>>(piece),
                      [](const std::vector<std::string>& pieces) {
                        std::string text;
                        for (const auto& part : pieces) text += part;
                        return text;
                      });
}

Value any_scalar() {
  switch (*rc::gen::inRange(0, 7)) {
    case 0:
      return Value();
    case 1:
      return *rc::gen::arbitrary<bool>();
    case 2:
      return *rc::gen::arbitrary<std::int64_t>();
    case 3:
      return std::bit_cast<double>(*rc::gen::arbitrary<std::uint64_t>());
    case 4:
      return *any_text();
    case 5:
      return Value(Value::Bytes{*rc::gen::arbitrary<std::string>()});
    default:
      return Value(Value::BigInteger{"-" + std::to_string(*rc::gen::arbitrary<std::uint64_t>())});
  }
}

Value any_value(int depth) {
  const int kind = depth == 0 ? 9 : *rc::gen::inRange(0, 10);
  if (kind > 1) return any_scalar();
  Value::List list;
  for (int i = *rc::gen::inRange(0, 4); i > 0; --i) list.push_back(any_value(depth - 1));
  if (kind == 0) return Value(std::move(list));
  return Value(Value::Tagged{*any_text(), std::move(list)});
}

void fill(StateDictBuilder& builder, NodeKind kind, int depth) {
  for (int i = *rc::gen::inRange(0, 5); i > 0; --i) {
    const Key key = any_scalar();
    const int what = *rc::gen::inRange(0, depth == 0 ? 5 : 8);
    if (what < 3) {
      (void)builder.value(key, any_value(3));  // A key given twice is refused; the tree lacks it.
    } else if (what < 5) {
      const auto dtype = static_cast<DType>(*rc::gen::inRange<int>(0, kDTypeCount));
      (void)builder.tensor(
          key, view_of(dtype, {4, *rc::gen::inRange<std::uint64_t>(0, 5)}, *any_text()));
    } else {
      const auto child = static_cast<NodeKind>(*rc::gen::inRange(0, 5));
      if (!builder.begin(key, child)) continue;
      fill(builder, child, depth - 1);
      RC_ASSERT(builder.end().has_value());
    }
  }
  if (kind == NodeKind::kOrderedDict && depth > 0 && *rc::gen::arbitrary<bool>()) {
    const auto child = static_cast<NodeKind>(*rc::gen::inRange(0, 5));
    RC_ASSERT(builder.begin_metadata(child).has_value());
    fill(builder, child, depth - 1);
    RC_ASSERT(builder.end().has_value());
  }
}

RC_GTEST_PROP(Manifest, AnyStateRoundTripsExactly, ()) {
  const auto root = static_cast<NodeKind>(*rc::gen::inRange(0, 3));
  StateDictBuilder builder(root);
  fill(builder, root, 4);
  const Manifest manifest = manifest_of(*builder.finish());
  const auto text = write_manifest(manifest);
  RC_ASSERT(text.has_value());
  const auto parsed = parse_manifest(*text);
  RC_ASSERT(parsed.has_value());
  RC_ASSERT(same(manifest.tree, parsed->tree));
  RC_ASSERT(*write_manifest(*parsed) == *text);
}

}  // namespace
}  // namespace strandline::format
