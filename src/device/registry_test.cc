#include "device/registry.h"

#include <gtest/gtest.h>

#include "testing/fake_device.h"

namespace strandline::device {
namespace {

TEST(Registry, KnowsTheHostFromTheStart) {
  const Registry registry;
  ASSERT_NE(registry.find("host"), nullptr);
  EXPECT_EQ(registry.find("host")->kind(), "host");
  EXPECT_EQ(registry.find("cuda"), nullptr);
}

TEST(Registry, ALaterDeviceOfAKindTakesThePlaceOfTheEarlier) {
  Registry registry;
  const auto first = std::make_shared<testing::FakeDevice>();
  const auto second = std::make_shared<testing::FakeDevice>();
  registry.add(first);
  EXPECT_EQ(registry.find("fake"), first.get());
  registry.add(second);
  EXPECT_EQ(registry.find("fake"), second.get());
}

}  // namespace
}  // namespace strandline::device
