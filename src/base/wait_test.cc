// Waits that are given up, and turns.

#include "base/wait.h"

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <latch>
#include <thread>
#include <vector>

#include "base/result_macros.h"
#include "base/turn.h"

namespace strandline::base {
namespace {

Clock::Instant soon() { return std::chrono::steady_clock::now() + std::chrono::seconds(60); }

// Waits for ever, but for `wait`.
Status wait_in_vain(Wait& wait, Mutex& mutex, ConditionVariable& condition) {
  MutexLock lock(mutex);
  while (!wait.expired()) STRANDLINE_RETURN_IF_ERROR(wait.pause(condition, mutex));
  return failure(ErrorCode::kTimeout, "in vain");
}

TEST(Wait, IsAskedWithoutTheLockUntilItIsInterrupted) {
  Mutex mutex;
  ConditionVariable condition;
  int asked = 0;
  Wait wait(soon(), [&] {
    MutexLock lock(mutex);  // Would hang if the waiter held it.
    return ++asked == 3;
  });
  const auto began = std::chrono::steady_clock::now();
  const Status ended = wait_in_vain(wait, mutex, condition);
  EXPECT_EQ(ended.error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(asked, 3);
  EXPECT_GE(std::chrono::steady_clock::now() - began, 3 * kInterruptPoll);
}

TEST(Wait, FrequentNotificationsDoNotPutTheQuestionOff) {
  Mutex mutex;
  ConditionVariable condition;
  std::atomic<bool> asked = false;
  std::thread notifier([&] {
    while (!asked) condition.notify_all();
  });
  Wait wait(soon(), [&] { return asked = true; });
  EXPECT_EQ(wait_in_vain(wait, mutex, condition).error().code, ErrorCode::kUnavailable);
  notifier.join();
}

TEST(Wait, EndsAtItsDeadlineWhetherItIsAskedOrNot) {
  Mutex mutex;
  ConditionVariable condition;
  for (const bool asked : {false, true}) {
    Wait wait(std::chrono::steady_clock::now() + std::chrono::milliseconds(150),
              asked ? [] { return false; } : std::function<bool()>());
    EXPECT_EQ(wait_in_vain(wait, mutex, condition).error().code, ErrorCode::kTimeout);
  }
  Wait past(Clock::Instant{}, [] { return true; });
  EXPECT_EQ(wait_in_vain(past, mutex, condition).error().code, ErrorCode::kTimeout);
}

TEST(Turn, OneThreadAtATimeHasItAndKnowsThatItHas) {
  Turns turns;
  int inside = 0;
  bool alone = true;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        Wait wait(soon());
        Turn turn(turns);
        ASSERT_TRUE(turn.begin(wait, "hangs"));
        alone = alone && ++inside == 1 && turns.held_by_this_thread();
        --inside;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_TRUE(alone);
  EXPECT_FALSE(turns.held_by_this_thread());
}

TEST(Turn, WaitingForItTimesOutAndCanBeInterrupted) {
  Turns turns;
  std::latch taken(1);
  std::latch over(1);
  std::thread holder([&] {
    Wait wait(soon());
    Turn turn(turns);
    EXPECT_TRUE(turn.begin(wait, "hangs"));
    taken.count_down();
    over.wait();
  });
  taken.wait();
  EXPECT_FALSE(turns.held_by_this_thread());
  Turn turn(turns);
  Wait past(Clock::Instant{});
  const Status late = turn.begin(past, "somebody else was served");
  EXPECT_EQ(late.error().code, ErrorCode::kTimeout);
  EXPECT_EQ(late.error().message, "somebody else was served");
  Wait interrupted(soon(), [] { return true; });
  EXPECT_EQ(turn.begin(interrupted, "hangs").error().code, ErrorCode::kUnavailable);
  over.count_down();
  Wait patient(soon());
  EXPECT_TRUE(turn.begin(patient, "hangs"));
  holder.join();
}

}  // namespace
}  // namespace strandline::base
