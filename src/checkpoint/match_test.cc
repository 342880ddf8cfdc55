#include "checkpoint/match.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <vector>

namespace strandline::checkpoint {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// A state of one item "x"; node 1 is that item.
StateDict state_of(const std::function<void(StateDictBuilder&)>& add) {
  StateDictBuilder builder;
  add(builder);
  return *builder.finish();
}

// "x" as a list or tuple of dicts {"n": 0}, each of which may stand for an object.
StateDict dicts(NodeKind kind, int count) {
  return state_of([&](StateDictBuilder& builder) {
    EXPECT_TRUE(builder.begin("x", kind));
    for (int i = 0; i < count; ++i) {
      EXPECT_TRUE(builder.begin(i, NodeKind::kDict));
      EXPECT_TRUE(builder.value("n", i));
      EXPECT_TRUE(builder.end());
    }
    EXPECT_TRUE(builder.end());
  });
}

StateDict one(NodeKind kind, bool with_value = false) {
  return state_of([&](StateDictBuilder& builder) {
    EXPECT_TRUE(builder.begin("x", kind));
    if (with_value) {
      EXPECT_TRUE(builder.value("n", 1));
    }
    EXPECT_TRUE(builder.end());
  });
}

// Nodes: 0 the root, 1 the list, 2 and 4 its dicts, 3 and 5 their values.
const std::vector<std::uint32_t> kBothDicts{2, 4};

TEST(Match, AListWithObjectsTakesOnlyAListOfItsLength) {
  const StateDict here = dicts(NodeKind::kList, 2);
  EXPECT_TRUE(check_match(match(dicts(NodeKind::kList, 2), here, kBothDicts), true));
  for (const int count : {0, 1, 3}) {
    const Match longer = match(dicts(NodeKind::kList, count), here, kBothDicts);
    EXPECT_THAT(longer.different, ElementsAre(HasSubstr("x: saved as a list of length")));
    EXPECT_FALSE(check_match(longer, false));
  }
  EXPECT_THAT(match(StateDict{{"x", 5}}, here, kBothDicts).different,
              ElementsAre(HasSubstr("x: saved as a plain value, here a list of length 2")));
  EXPECT_THAT(match(one(NodeKind::kDict), here, kBothDicts).different,
              ElementsAre(HasSubstr("x: saved as a dict")));
  // One object is enough.
  EXPECT_FALSE(check_match(match(dicts(NodeKind::kList, 3), here, {4}), true));
}

TEST(Match, AListWithoutObjectsAndTensorsTakesAnything) {
  const StateDict here = dicts(NodeKind::kList, 2);
  for (const StateDict& saved : {dicts(NodeKind::kList, 3), StateDict{{"x", 5}}}) {
    EXPECT_TRUE(check_match(match(saved, here), true));
    EXPECT_THAT(match(saved, here).values, IsEmpty());
  }
}

TEST(Match, ListsAndTuplesAreAlikeAndSoAreAllDicts) {
  EXPECT_TRUE(
      check_match(match(dicts(NodeKind::kList, 2), dicts(NodeKind::kTuple, 2), kBothDicts), true));
  EXPECT_TRUE(
      check_match(match(one(NodeKind::kDict, true), one(NodeKind::kOrderedDict, true), {1}), true));
}

TEST(Match, AnObjectTakesOnlyTheSortOfContainerThatItHas) {
  const StateDict here = one(NodeKind::kDict);  // Its state_dict() gives {}.
  EXPECT_TRUE(check_match(match(one(NodeKind::kDict), here, {1}), true));
  EXPECT_TRUE(check_match(match(one(NodeKind::kOrderedDict, true), here, {1}), true));
  EXPECT_THAT(match(StateDict{{"x", 5}}, here, {1}).different,
              ElementsAre(HasSubstr("x: saved as a plain value, here an object")));
  EXPECT_THAT(match(one(NodeKind::kList), here, {1}).different,
              ElementsAre(HasSubstr("x: saved as a list, here an object")));
  EXPECT_TRUE(check_match(match(StateDict{{"x", 5}}, here), true));  // A plain empty dict.
}

TEST(Match, NamesOfAnObjectInAListAreCompared) {
  const StateDict here = dicts(NodeKind::kList, 1);
  const StateDict saved = state_of([](StateDictBuilder& builder) {
    EXPECT_TRUE(builder.begin("x", NodeKind::kList));
    EXPECT_TRUE(builder.begin(0, NodeKind::kDict));
    EXPECT_TRUE(builder.value("m", 1));
    EXPECT_TRUE(builder.end());
    EXPECT_TRUE(builder.end());
  });
  const Match found = match(saved, here, {2});
  EXPECT_THAT(found.missing, ElementsAre("x.0.n"));
  EXPECT_THAT(found.unexpected, ElementsAre("x.0.m"));
}

TEST(Match, ListsInsideAnObjectAreItsOwnBusiness) {
  // Node 1 is the object "x", node 2 its list, node 3 an object in that.
  const auto object_with_list = [](int count) {
    return state_of([&](StateDictBuilder& builder) {
      EXPECT_TRUE(builder.begin("x", NodeKind::kDict));
      EXPECT_TRUE(builder.begin("list", NodeKind::kList));
      for (int i = 0; i < count; ++i) {
        EXPECT_TRUE(builder.begin(i, NodeKind::kDict));
        EXPECT_TRUE(builder.end());
      }
      EXPECT_TRUE(builder.end());
      EXPECT_TRUE(builder.end());
    });
  };
  EXPECT_TRUE(check_match(match(object_with_list(3), object_with_list(1), {1, 3}), true));
  EXPECT_FALSE(check_match(match(object_with_list(3), object_with_list(1), {3}), true));
}

}  // namespace
}  // namespace strandline::checkpoint
