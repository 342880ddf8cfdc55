// Threads that the system refuses.

#include "base/executor.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <fstream>

namespace strandline::base {
namespace {

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

TEST(ThreadExecutor, WhereThreadsAreRefusedStartFailsAndTheSignalMaskIsLeftAsItWas) {
  std::uint64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_AS, &before), 0);
  rlimit tight = before;
  tight.rlim_cur = pages * 4096 + (256u << 20);  // Room for some stacks of 8 MiB, not for 200.
  ASSERT_EQ(::setrlimit(RLIMIT_AS, &tight), 0);
  const auto started = ThreadExecutor::start(200, 4, "test");
  ASSERT_EQ(::setrlimit(RLIMIT_AS, &before), 0);
  ASSERT_FALSE(started);
  EXPECT_EQ(started.error().code, ErrorCode::kUnavailable);
  EXPECT_NE(started.error().system_errno, 0);
  EXPECT_NE(started.error().message.find("copy_threads"), std::string::npos);
  sigset_t mask;
  ASSERT_EQ(::pthread_sigmask(SIG_SETMASK, nullptr, &mask), 0);
  EXPECT_EQ(::sigismember(&mask, SIGINT), 0);
  EXPECT_TRUE(ThreadExecutor::start(2, 4, "test"));
}

#endif

}  // namespace
}  // namespace strandline::base
