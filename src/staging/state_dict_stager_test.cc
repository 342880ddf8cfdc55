// What StateDictStager gives back: the same structure in memory of its own.

#include <gtest/gtest.h>

#include <vector>

#include "strandline/stager.h"
#include "testing/checkpoint_fixture.h"

namespace strandline::testing {
namespace {

TEST(StateDictStager, GivesTheSameStateInMemoryOfItsOwn) {
  Job job(3);
  StateDictStager stager = must(StateDictStager::open({}));
  const StateDict staged = must(stager.stage(job.state()));
  const auto expected = content_of(job);
  EXPECT_EQ(content_of(staged), expected);
  job = Job(4);
  EXPECT_EQ(content_of(staged), expected);
  EXPECT_EQ(staged.tensors()[0].data, staged.tensors()[1].data);
}

}  // namespace
}  // namespace strandline::testing
