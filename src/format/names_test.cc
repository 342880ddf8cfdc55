#include "format/names.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <limits>
#include <set>

namespace strandline::format {
namespace {

TensorView tensor() { return TensorView::row_major(nullptr, DType::kU8, {0}); }

// Adds a tensor at a path of two keys.
void add(StateDictBuilder& builder, const Key& group, const std::vector<Key>& names) {
  ASSERT_TRUE(builder.begin(group, NodeKind::kDict));
  for (const Key& name : names) ASSERT_TRUE(builder.tensor(name, tensor()));
  ASSERT_TRUE(builder.end());
}

std::vector<std::string> stems(const Grouping& grouping) {
  std::vector<std::string> names;
  for (const auto& group : grouping.groups) names.push_back(group.file_stem);
  return names;
}

using Names = std::vector<std::string>;

TEST(StepNames, RoundTripAndHaveOneFormOnly) {
  EXPECT_EQ(step_directory_name(1200), "step-00001200");
  for (const std::int64_t step :
       {std::int64_t{0}, std::int64_t{99'999'999}, std::int64_t{100'000'000},
        std::numeric_limits<std::int64_t>::max()}) {
    EXPECT_EQ(parse_step_directory_name(step_directory_name(step)), step);
  }
  for (const std::string_view name :
       {"", "step-", "step-1200", "step-000001200", "step-0000120a", "step-00001200 ",
        "Step-00001200", "step--0001200", "step-+0001200", "step-99999999999999999999",
        "step-00001200/", ".step-00001200"}) {
    EXPECT_FALSE(parse_step_directory_name(name)) << name;
  }
}

TEST(DirectoryNames, SayWhatTheyAre) {
  using Kind = DirectoryName::Kind;
  const std::string step = step_directory_name(7);
  const auto check = [](const std::string& name, Kind kind, std::string_view final_name,
                        std::string_view id) {
    const DirectoryName parsed = parse_directory_name(name);
    EXPECT_EQ(parsed.kind, kind) << name;
    EXPECT_EQ(parsed.final_name, final_name) << name;
    EXPECT_EQ(parsed.id, id) << name;
  };
  EXPECT_EQ(partial_directory_name(step, "7f3a"), ".step-00000007.partial-7f3a");
  check(step, Kind::kStep, step, "");
  // A final name may look like any of the others.
  for (const std::string& final_name :
       {step, std::string("model.ckpt"), std::string("x"), std::string(".hidden"),
        std::string("a.deleting"), std::string(".a.partial-1"), std::string("b.replaced-2.")}) {
    check(partial_directory_name(final_name, "7f3a"), Kind::kPartial, final_name, "7f3a");
    check("." + final_name + ".replaced-7f3a", Kind::kReplaced, final_name, "7f3a");
    check("." + final_name + ".deleting", Kind::kDeleting, final_name, "");
  }
  for (const std::string name :
       {"", ".", "..", "...", ".lock", "step-1", "x.partial-7f3a", ".x.partial-", ".x.partial",
        ".partial-7f3a", "..partial-7f3a", ".deleting", ".x.deletin"}) {
    check(name, Kind::kOther, "", "");
  }
}

TEST(FileNames, LeaveNoWayOutOfTheDirectory) {
  for (const std::string_view name : {"manifest.json", "a", "A~2", "_x-1.b_", "~"}) {
    EXPECT_TRUE(is_file_name(name)) << name;
  }
  for (const std::string_view name : {"", ".", "..", ".hidden", "../x", "a/b", "/etc/passwd",
                                      "a\\b", "a b", "caf\xc3\xa9", "a:b", "a\n"}) {
    EXPECT_FALSE(is_file_name(name)) << name;
  }
  EXPECT_FALSE(is_file_name(std::string_view("a\0b", 3)));
  EXPECT_TRUE(is_file_name(std::string(255, 'a')));
  EXPECT_FALSE(is_file_name(std::string(256, 'a')));
}

TEST(FileNames, AreThoseOfTheDesign) {
  EXPECT_EQ(shard_file_name("model", 1, 1), "model-00001-of-00001.safetensors");
  EXPECT_EQ(rank_file_name(0), "rank-00000.json");
  EXPECT_EQ(index_file_name("model"), "model.safetensors.index.json");
}

TEST(Groups, AreTheTopLevelKeysThatHoldTensors) {
  StateDictBuilder builder;
  add(builder, "model", {"weight", "bias"});
  ASSERT_TRUE(builder.value("epoch", 3));
  ASSERT_TRUE(builder.begin("schedule", NodeKind::kDict));
  ASSERT_TRUE(builder.value("lr", 0.1));
  ASSERT_TRUE(builder.end());
  add(builder, "optimizer", {0});
  const StateDict state = *builder.finish();
  const Grouping grouping = group_tensors(state.structure());
  EXPECT_EQ(stems(grouping), (Names{"model", "optimizer"}));
  EXPECT_EQ(grouping.groups[0].tensors, (std::vector<std::uint32_t>{0, 1}));
  EXPECT_EQ(grouping.names, (Names{"weight", "bias", "0"}));
}

TEST(Groups, TensorsAtTheTopGiveWayToAKeyCalledState) {
  StateDictBuilder builder;
  ASSERT_TRUE(builder.tensor("scale", tensor()));
  add(builder, "State", {"x"});
  ASSERT_TRUE(builder.tensor("shift", tensor()));
  const StateDict state = *builder.finish();
  const Grouping grouping = group_tensors(state.structure());
  ASSERT_EQ(stems(grouping), (Names{"state~2", "State"}));
  EXPECT_EQ(grouping.groups[0].key, "state");
  EXPECT_EQ(grouping.groups[0].tensors, (std::vector<std::uint32_t>{0, 2}));
  EXPECT_EQ(grouping.names, (Names{"scale", "x", "shift"}));
}

TEST(Groups, StemsAreCleanAndDistinctWithoutRegardToCase) {
  StateDictBuilder builder;
  for (const Key& key : {Key("model"), Key("Model"), Key("model~2"), Key("a/b"), Key("a b"),
                         Key("../etc"), Key(""), Key("\xe6\xa8\xa1"), Key(0), Key("0"),
                         Key(std::string(300, 'x')), Key(std::string(200, 'x'))}) {
    add(builder, key, {"t"});
  }
  const StateDict state = *builder.finish();
  EXPECT_EQ(stems(group_tensors(state.structure())),
            (Names{"model", "Model~2", "model~2~2", "a_b", "a_b~2", "_._etc", "_", "_~2", "0",
                   "0~2", std::string(128, 'x'), std::string(128, 'x') + "~2"}));
}

TEST(Groups, MoreThan64AreFoldedIntoOne) {
  for (const std::uint32_t count : {kGroupsMax, kGroupsMax + 1}) {
    StateDictBuilder builder;
    for (std::uint32_t i = 0; i < count; ++i) add(builder, i, {"t"});
    const StateDict state = *builder.finish();
    const Grouping grouping = group_tensors(state.structure());
    if (count == kGroupsMax) {
      EXPECT_EQ(grouping.groups.size(), kGroupsMax);
      EXPECT_EQ(grouping.names[5], "t");
    } else {
      ASSERT_EQ(stems(grouping), Names{"state"});
      EXPECT_EQ(grouping.groups[0].key, "state");
      EXPECT_EQ(grouping.groups[0].tensors.size(), count);
      EXPECT_EQ(grouping.names[5], "5.t");
    }
  }
}

TEST(Labels, CollisionsAndReservedNamesGetANumber) {
  StateDictBuilder builder;
  ASSERT_TRUE(builder.begin("g", NodeKind::kDict));
  ASSERT_TRUE(builder.begin("a", NodeKind::kList));
  ASSERT_TRUE(builder.tensor({}, tensor()));
  ASSERT_TRUE(builder.begin({}, NodeKind::kDict));
  ASSERT_TRUE(builder.tensor("", tensor()));
  ASSERT_TRUE(builder.end());
  ASSERT_TRUE(builder.end());
  for (const Key& key : {Key("a.0"), Key("a.0~2"), Key("__metadata__"), Key(""), Key("_"),
                         Key(std::string("n\0l", 3)), Key("n_l"), Key(), Key(true), Key(0.5),
                         Key(Value::Bytes{"\xff"})}) {
    ASSERT_TRUE(builder.tensor(key, tensor()));
  }
  ASSERT_TRUE(builder.end());
  const StateDict state = *builder.finish();
  EXPECT_EQ(group_tensors(state.structure()).names,
            (Names{"a.0", "a.1.", "a.0~2", "a.0~2~2", "__metadata__~2", "_", "_~2", "n_l", "n_l~2",
                   "None", "True", "0.5", R"(b'\xff')"}));
}

TEST(Labels, ATensorInTheMetadataOfAnOrderedDictHasOne) {
  StateDictBuilder builder;
  ASSERT_TRUE(builder.begin("model", NodeKind::kOrderedDict));
  ASSERT_TRUE(builder.tensor("_metadata", tensor()));
  ASSERT_TRUE(builder.begin_metadata(NodeKind::kDict));
  ASSERT_TRUE(builder.tensor("t", tensor()));
  ASSERT_TRUE(builder.end());
  ASSERT_TRUE(builder.end());
  const StateDict state = *builder.finish();
  EXPECT_EQ(group_tensors(state.structure()).names, (Names{"_metadata", "_metadata.t"}));
}

TEST(Labels, ManyEqualOnesTakeNoQuadraticTime) {
  StateDictBuilder builder;
  constexpr int kCount = 50'000;
  for (int i = 0; i < kCount; ++i) {
    // Dicts "a" and "a.b" of many shapes would do; bytes of which only the first are shown are
    // simpler.
    const auto number = std::to_string(i);
    ASSERT_TRUE(builder.tensor(Value::Bytes{std::string(20, 'x') + number}, tensor()));
  }
  const StateDict state = *builder.finish();
  const Grouping grouping = group_tensors(state.structure());
  EXPECT_EQ(std::set<std::string>(grouping.names.begin(), grouping.names.end()).size(),
            static_cast<std::size_t>(kCount));
}

std::string lower_case(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  return text;
}

// Keys that come close to what names on disk are made of.
rc::Gen<std::string> key_text() {
  const auto piece = rc::gen::element<std::string>(
      "model", "MODEL", "state", "rank", "manifest", "config", ".json", ".safetensors",
      ".safetensors.index.json", "-00001-of-00001", "-00000", "~2", "/", ".", "_", "", "\xc3\xa9",
      std::string(130, 'x'), std::string(1, '\0'), "__metadata__");
  return rc::gen::map(rc::gen::container<std::vector<std::string>>(piece),
                      [](const std::vector<std::string>& pieces) {
                        std::string text;
                        for (std::size_t i = 0; i < std::min<std::size_t>(pieces.size(), 3); ++i) {
                          text += pieces[i];
                        }
                        return text;
                      });
}

RC_GTEST_PROP(Names, AllFilesOfAStepAndAllTensorsOfAShardAreDistinct, ()) {
  StateDictBuilder builder;
  for (int i = *rc::gen::inRange(0, 70); i > 0; --i) {
    // A key that is there already is refused by the builder; the tree then just lacks it.
    const std::string key = *key_text();
    if (*rc::gen::inRange(0, 4) == 0) {
      (void)builder.tensor(key, tensor());
    } else if (builder.begin(key, NodeKind::kDict)) {
      for (int k = *rc::gen::inRange(0, 4); k > 0; --k) (void)builder.tensor(*key_text(), tensor());
      RC_ASSERT(builder.end().has_value());
    }
  }
  const auto state = builder.finish();
  RC_ASSERT(state.has_value());
  const Grouping grouping = group_tensors(state->structure());

  std::set<std::string> files;
  const auto add_file = [&](const std::string& name) {
    RC_ASSERT(is_file_name(name));
    RC_ASSERT(files.insert(lower_case(name)).second);
  };
  add_file("manifest.json");
  add_file("config.json");
  for (std::uint32_t rank = 0; rank < 3; ++rank) add_file(rank_file_name(rank));
  std::size_t tensors = 0;
  for (const Grouping::Group& group : grouping.groups) {
    for (std::uint32_t part = 1; part <= 3; ++part)
      add_file(shard_file_name(group.file_stem, part, 3));
    add_file(index_file_name(group.file_stem));
    RC_ASSERT(!group.tensors.empty());
    std::set<std::string> names;
    for (const std::uint32_t tensor : group.tensors) {
      const std::string& name = grouping.names[tensor];
      RC_ASSERT(names.insert(name).second);
      RC_ASSERT(name != "__metadata__" && !name.empty());
      RC_ASSERT(name.find('\0') == std::string::npos);
    }
    tensors += group.tensors.size();
  }
  RC_ASSERT(tensors == state->structure().tensors().size());
  RC_ASSERT(grouping.groups.size() <= kGroupsMax);
}

}  // namespace
}  // namespace strandline::format
