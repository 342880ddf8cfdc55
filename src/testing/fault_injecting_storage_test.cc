#include "testing/fault_injecting_storage.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "testing/temporary_directory.h"

namespace strandline::testing {
namespace {

using ::testing::ElementsAre;

class FaultInjection : public ::testing::Test {
 protected:
  // One save, every call checked. The first error, if any.
  Status save(std::string_view name) {
    auto partial = storage_.begin(".partial");
    if (!partial) return failure(partial.error());
    {
      auto file = (*partial)->create("data", 1);
      if (!file) return failure(file.error());
      std::optional<Status> written;
      const std::string text = "x";
      (*file)->write_at(0, std::as_bytes(std::span(text)),
                        [&written](Status status) { written = std::move(status); });
      if (!written) return failure(ErrorCode::kTimeout, "not completed");
      if (!*written) return *written;
      if (Status synced = (*file)->sync(); !synced) return synced;
    }
    auto published = storage_.publish(std::move(*partial), name, Publish::kNew);
    if (!published) return failure(published.error());
    return published->durable;
  }
  std::vector<std::string> operations() {
    std::vector<std::string> all;
    for (const auto& call : storage_.log()) {
      all.push_back(call.operation + " " + call.name + (call.failed ? " failed" : ""));
    }
    return all;
  }

  TemporaryDirectory directory_;
  std::shared_ptr<Storage> below_ = open_posix_storage(directory_ / "root").value();
  FaultInjectingStorage storage_{below_};
};

TEST_F(FaultInjection, EveryCallIsLoggedWithItsName) {
  ASSERT_TRUE(save("s"));
  ASSERT_TRUE(storage_.list());
  const auto step = storage_.open("s");
  ASSERT_TRUE(step);
  std::vector<std::byte> bytes(1);
  EXPECT_TRUE((*step)->list());
  EXPECT_TRUE((*step)->file_bytes("data"));
  EXPECT_TRUE((*step)->read_at("data", 0, bytes));
  EXPECT_TRUE(storage_.lock("here"));
  EXPECT_TRUE(storage_.remove("s"));
  EXPECT_TRUE(storage_.remove_if_abandoned(".partial"));
  EXPECT_THAT(operations(),
              ElementsAre("begin .partial", "create .partial/data", "write_at .partial/data",
                          "sync .partial/data", "publish s", "list ", "open s", "list_step s",
                          "file_bytes s/data", "read_at s/data", "lock here", "remove s",
                          "remove_if_abandoned .partial"));
  EXPECT_EQ(storage_.calls(), 13);
}

TEST_F(FaultInjection, EachCallFailsInTurnWithoutReachingTheStorageBelow) {
  ASSERT_TRUE(save("first"));
  const std::uint64_t calls = storage_.calls();
  for (std::uint64_t i = 1; i <= calls; ++i) {
    storage_.fail_call(storage_.calls() + i, EIO);
    const Status saved = save("s");
    ASSERT_FALSE(saved) << "call " << i;
    EXPECT_EQ(saved.error().code, ErrorCode::kIo);
    EXPECT_EQ(saved.error().system_errno, EIO);
    EXPECT_TRUE(storage_.log().back().failed);
    EXPECT_THAT(below_->list().value(), ElementsAre("first")) << "call " << i;
  }
  EXPECT_TRUE(save("s"));
}

TEST_F(FaultInjection, AllCallsAfterANumberFailUntilFaultsAreCleared) {
  storage_.fail_all_after(2, ENOSPC);
  EXPECT_EQ(save("s").error().system_errno, ENOSPC);
  EXPECT_EQ(storage_.list().error().system_errno, ENOSPC);
  EXPECT_THAT(operations(), ElementsAre("begin .partial", "create .partial/data",
                                        "write_at .partial/data failed", "list  failed"));
  storage_.clear_faults();
  EXPECT_TRUE(save("s"));
}

TEST_F(FaultInjection, TheNthCallOfAnOperationFailsOnce) {
  storage_.fail_operation("sync", 2, EIO);
  EXPECT_TRUE(save("a"));
  EXPECT_EQ(save("b").error().system_errno, EIO);
  EXPECT_TRUE(save("c"));
  EXPECT_THAT(below_->list().value(), ElementsAre("a", "c"));
}

TEST_F(FaultInjection, AStepCanBeVisibleWithoutBeingDurable) {
  storage_.fail_durability(EIO);
  EXPECT_EQ(save("s").error().system_errno, EIO);
  EXPECT_THAT(below_->list().value(), ElementsAre("s"));
  storage_.clear_faults();
  EXPECT_TRUE(save("t"));
}

TEST_F(FaultInjection, TheHookRunsBeforeTheCallAndMayPlanItsFailure) {
  std::vector<std::string> at_publish;
  storage_.before_each_call([&](const FaultInjectingStorage::Call& call) {
    if (call.operation != "publish") return;
    at_publish = below_->list().value();
    storage_.fail_call(call.number, EROFS);
  });
  EXPECT_EQ(save("s").error().system_errno, EROFS);
  EXPECT_THAT(at_publish, ElementsAre(".partial"));
  storage_.before_each_call({});
  EXPECT_TRUE(save("s"));
}

TEST_F(FaultInjection, CallsOfManyThreadsAreAllCounted) {
  ASSERT_TRUE(save("s"));
  const std::uint64_t before = storage_.calls();
  const auto step = storage_.open("s").value();
  storage_.fail_operation("file_bytes", 10, EIO);
  std::atomic<int> failed = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) failed += step->file_bytes("data") ? 0 : 1;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(storage_.calls(), before + 1 + 4 * 50);
  EXPECT_EQ(failed, 1);
}

}  // namespace
}  // namespace strandline::testing
