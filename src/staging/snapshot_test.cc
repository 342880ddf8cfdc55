// The hand-over between producer and consumer of a snapshot.

#include "staging/snapshot.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <latch>
#include <string>
#include <thread>
#include <vector>

namespace strandline::staging {
namespace {

constexpr base::Clock::Instant kDoNotWait{};

base::Clock::Instant soon() { return std::chrono::steady_clock::now() + std::chrono::seconds(60); }

// Two segments of a page of one file, with memory.
class SnapshotTest : public ::testing::Test {
 protected:
  SnapshotTest() : slab_({.host_bytes_max = 8192}) {
    auto plan = std::make_shared<Plan>();
    plan->files.push_back(FilePlan{.group = "m",
                                   .name = "m",
                                   .index_name = "i",
                                   .header = std::string(4096, ' '),
                                   .tensors = {{.tensor = 0, .name = "w", .bytes = 4096}},
                                   .data_bytes = 4096});
    snapshot_ = std::make_unique<Snapshot>(
        plan, std::vector<Segment>{{.bytes = 4096}, {.file_offset = 4096, .bytes = 4096}}, true);
    const std::vector<std::uint64_t> sizes = {4096, 4096};
    std::vector<memory::Lease> leases = slab_.lease(sizes, do_not_wait_).value();
    snapshot_->set_lease(0, leases[0]);
    snapshot_->set_lease(1, leases[1]);
  }

  base::Wait do_not_wait_{kDoNotWait};
  memory::Slab slab_;
  std::unique_ptr<Snapshot> snapshot_;
};

TEST_F(SnapshotTest, AConsumerWaitsUntilASegmentIsFilled) {
  EXPECT_EQ(snapshot_->wait_segment(0, kDoNotWait).error().code, ErrorCode::kTimeout);
  std::latch waiting(1);
  std::thread consumer([&] {
    waiting.count_down();
    const auto bytes = snapshot_->wait_segment(0, soon());
    ASSERT_TRUE(bytes);
    EXPECT_EQ(bytes->size(), 4096u);
    EXPECT_EQ(snapshot_->digests(0, 0)[0].low, 5u);
  });
  waiting.wait();
  snapshot_->set_digest(0, 0, 0, format::Digest{.high = 4, .low = 5});
  snapshot_->set_filled(0);
  consumer.join();
}

TEST_F(SnapshotTest, TheFirstErrorCountsAndWakesTheConsumer) {
  std::latch waiting(1);
  std::thread consumer([&] {
    waiting.count_down();
    EXPECT_EQ(snapshot_->wait_segment(1, soon()).error().message, "first");
  });
  waiting.wait();
  snapshot_->fail(Error{.message = "first"});
  snapshot_->fail(Error{.message = "second"});
  consumer.join();
  EXPECT_EQ(snapshot_->status().error().message, "first");
  snapshot_->set_filled(0);
  EXPECT_FALSE(snapshot_->wait_segment(0, kDoNotWait));
}

TEST_F(SnapshotTest, ReleasedMemoryCanBeLeasedAgain) {
  snapshot_->set_filled(0);
  snapshot_->release_segment(0);
  EXPECT_EQ(slab_.bytes_in_use(), 4096u);
  snapshot_->release_segment(1);  // Not filled yet: the producer is still writing.
  EXPECT_EQ(slab_.bytes_in_use(), 4096u);
  snapshot_->set_filled(1);
  EXPECT_EQ(slab_.bytes_in_use(), 0u);
}

TEST_F(SnapshotTest, AFailureKeepsWhatTheConsumerMayBeReading) {
  snapshot_->set_filled(0);
  snapshot_->fail(Error{.message = "device"});
  EXPECT_EQ(slab_.bytes_in_use(), 4096u);
  snapshot_->release_segment(0);
  EXPECT_EQ(slab_.bytes_in_use(), 0u);
}

TEST_F(SnapshotTest, AbandoningGivesAllMemoryBackAndTakesNoMore) {
  snapshot_->set_filled(0);
  snapshot_->abandon(Error{.message = "disk full"});
  EXPECT_EQ(slab_.bytes_in_use(), 0u);
  EXPECT_EQ(snapshot_->status().error().message, "disk full");
  const std::vector<std::uint64_t> sizes = {4096};
  snapshot_->set_lease(1, slab_.lease(sizes, do_not_wait_).value()[0]);
  EXPECT_EQ(slab_.bytes_in_use(), 0u);
}

TEST_F(SnapshotTest, TellsOnceWhenTheLastSegmentIsFilled) {
  int calls = 0;
  snapshot_->release_segment(0);
  snapshot_->release_segment(1);
  snapshot_->when_ended([&](const Status& status) {
    EXPECT_TRUE(status);
    EXPECT_EQ(slab_.bytes_in_use(), 0u) << "what was released has been given back";
    ++calls;
  });
  snapshot_->set_filled(1);
  EXPECT_EQ(calls, 0);
  EXPECT_FALSE(snapshot_->wait_ended(kDoNotWait));
  snapshot_->set_filled(0);
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(snapshot_->wait_ended(kDoNotWait));
  snapshot_->fail(Error{.message = "too late"});
  EXPECT_EQ(calls, 1);
}

TEST_F(SnapshotTest, TellsOnceThatItHasFailedWithItsMemoryGivenBack) {
  std::vector<std::string> errors;
  snapshot_->when_ended([&](const Status& status) {
    EXPECT_EQ(slab_.bytes_in_use(), 0u);
    errors.push_back(status.error().message);
  });
  snapshot_->fail(Error{.message = "first"});
  snapshot_->fail(Error{.message = "second"});
  snapshot_->set_filled(0);
  snapshot_->set_filled(1);
  EXPECT_EQ(errors, std::vector<std::string>{"first"});
  EXPECT_TRUE(snapshot_->wait_ended(kDoNotWait));
}

TEST_F(SnapshotTest, TellsAtOnceWhatHasEndedAlready) {
  snapshot_->set_filled(0);
  snapshot_->set_filled(1);
  bool told = false;
  snapshot_->when_ended([&](const Status& status) { told = status.has_value(); });
  EXPECT_TRUE(told);
}

TEST_F(SnapshotTest, TellsAtOnceWhatHasFailedAlready) {
  snapshot_->fail(Error{.message = "device"});
  std::string told;
  snapshot_->when_ended([&](const Status& status) { told = status.error().message; });
  EXPECT_EQ(told, "device");
}

TEST_F(SnapshotTest, WaitingForTheEndWakesUp) {
  std::latch waiting(1);
  std::thread watcher([&] {
    waiting.count_down();
    EXPECT_TRUE(snapshot_->wait_ended(soon()));
  });
  waiting.wait();
  snapshot_->set_filled(0);
  snapshot_->set_filled(1);
  watcher.join();
}

TEST_F(SnapshotTest, AFailureGivesNoMemoryTwice) {
  const memory::Lease lease = snapshot_->lease(0);
  EXPECT_NE(lease.data(), nullptr);
  snapshot_->fail(Error{.message = "device"});
  EXPECT_FALSE(snapshot_->lease(0));
  EXPECT_EQ(slab_.bytes_in_use(), 4096u) << "this test still holds it";
}

}  // namespace
}  // namespace strandline::staging
