// Futures: ended once, seen by all copies, callbacks exactly once on the thread that ends them.

#include "strandline/future.h"

#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "staging/future_state.h"
#include "testing/checkpoint_fixture.h"
#include "testing/child_process.h"

namespace strandline::testing {
namespace {

using StateFuture = Future<StateDict>;
constexpr std::chrono::milliseconds kNow{0};

StateDict epoch(int number) { return StateDict{{"epoch", number}}; }

TEST(Future, ThatHasEndedGivesItsValueAsOftenAsAsked) {
  const StateFuture future(epoch(3));
  EXPECT_TRUE(future.ready());
  for (int i = 0; i < 3; ++i) EXPECT_EQ(must(future.get(kNow)).values()[0].text(), "3");
}

TEST(Future, GivesTheErrorThatItEndedWith) {
  const StateFuture future(failure(ErrorCode::kIo, "ECC error"));
  EXPECT_TRUE(future.ready());
  EXPECT_EQ(must_fail(future.get(kNow)).message, "ECC error");
}

TEST(Future, ThatHasNotEndedTimesOutAndGoesOn) {
  const auto state = std::make_shared<StateFuture::State>();
  const StateFuture future(state);
  EXPECT_FALSE(future.ready());
  EXPECT_EQ(must_fail(future.get(kNow)).code, ErrorCode::kTimeout);
  EXPECT_EQ(must_fail(future.get(std::chrono::milliseconds::min())).code, ErrorCode::kTimeout);
  state->end(epoch(3));
  EXPECT_EQ(must(future.get(kNow)).values()[0].text(), "3");
}

TEST(Future, WakesEveryoneWhoWaits) {
  const auto state = std::make_shared<StateFuture::State>();
  std::vector<std::thread> waiters;
  std::atomic<int> got{0};
  std::latch waiting(3);
  for (int i = 0; i < 3; ++i) {
    waiters.emplace_back([&, future = StateFuture(state)] {
      waiting.count_down();
      // The longest deadline there is must not overflow.
      if (future.get(std::chrono::milliseconds::max())) ++got;
    });
  }
  waiting.wait();
  state->end(epoch(1));
  for (std::thread& waiter : waiters) waiter.join();
  EXPECT_EQ(got, 3);
}

TEST(Future, CallsBackOnceInOrderOnTheThreadThatEndsIt) {
  const auto state = std::make_shared<StateFuture::State>();
  const StateFuture future(state);
  std::vector<std::string> calls;
  std::thread::id where;
  for (const char* name : {"first", "second"}) {
    future.then([&, name](const Result<StateDict>& result) {
      EXPECT_TRUE(result);
      EXPECT_TRUE(future.ready());
      where = std::this_thread::get_id();
      calls.emplace_back(name);
    });
  }
  EXPECT_TRUE(calls.empty());
  std::thread device([&] { state->end(epoch(1)); });
  const std::thread::id ender = device.get_id();
  device.join();
  EXPECT_EQ(calls, (std::vector<std::string>{"first", "second"}));
  EXPECT_EQ(where, ender);
}

TEST(Future, CallsBackAtOnceWhenItHasEnded) {
  const StateFuture future(failure(ErrorCode::kIo, "ECC error"));
  int calls = 0;
  future.then([&](const Result<StateDict>& result) {
    EXPECT_EQ(must_fail(result).code, ErrorCode::kIo);
    ++calls;
    future.then([&](const Result<StateDict>&) { ++calls; });  // Callbacks may ask on.
  });
  EXPECT_EQ(calls, 2);
}

TEST(Future, CallbacksRegisteredWhileItEndsAreEachCalledOnce) {
  for (int round = 0; round < 200; ++round) {
    const auto state = std::make_shared<StateFuture::State>();
    std::atomic<int> calls{0};
    std::latch start(2);
    std::thread asking([&, future = StateFuture(state)] {
      start.arrive_and_wait();
      for (int i = 0; i < 10; ++i) future.then([&](const Result<StateDict>&) { ++calls; });
    });
    start.arrive_and_wait();
    state->end(epoch(round));
    asking.join();
    ASSERT_EQ(calls, 10);
  }
}

TEST(Future, TheResultGoesWithTheLastHandleThoughTheEngineStillHoldsTheState) {
  const auto keep_alive = std::make_shared<int>(0);
  std::uint8_t byte = 0;
  TensorView view = TensorView::row_major(&byte, DType::kU8, {1});
  view.keep_alive = keep_alive;
  const auto make = [&] { return StateDict{{"w", view}}; };
  {
    const auto state = std::make_shared<StateFuture::State>();
    std::optional<StateFuture> future(StateFuture::State::handle(state));
    state->end(make());
    const auto held = keep_alive.use_count();
    const StateFuture copy = *future;
    future.reset();
    EXPECT_EQ(keep_alive.use_count(), held);
  }
  EXPECT_EQ(keep_alive.use_count(), 2) << "this test's and its view's";
  for (const bool early : {false, true}) {
    const auto state = std::make_shared<StateFuture::State>();
    std::optional<StateFuture> future(StateFuture::State::handle(state));
    int calls = 0;
    if (early) {
      future->then([&](const Result<StateDict>& result) { calls += result ? 1 : 100; });
      future.reset();
    }
    state->end(make());
    EXPECT_EQ(calls, early ? 1 : 0);
    future.reset();
    EXPECT_EQ(keep_alive.use_count(), 2);
  }
}

TEST(Future, InAForkedChildGivesWhatHadEndedAndFailsWhatHadNot) {
  const StateFuture ended(epoch(3));
  const StateFuture open(std::make_shared<StateFuture::State>());
  ChildProcess child([&]() -> std::string {
    if (!ended.get(kNow)) return "the value is gone";
    if (open.ready()) return "ready";
    const Result<StateDict> result = open.get(std::chrono::hours(1));
    if (result || result.error().code != ErrorCode::kUnavailable) return "waits for nobody";
    bool called = false;
    open.then([&](const Result<StateDict>& failed) { called = !failed; });
    return called ? "as it should be" : "never calls back";
  });
  EXPECT_EQ(child.wait(), "as it should be");
}

}  // namespace
}  // namespace strandline::testing
