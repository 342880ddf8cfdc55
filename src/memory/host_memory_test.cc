#include "memory/host_memory.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <fstream>
#include <limits>
#include <string>

namespace strandline::memory {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();
constexpr const char* kMeminfo = "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    5000 kB\n";
constexpr const char* kMountV1 =
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n";
constexpr const char* kMountV2 = "41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n";

// A directory that stands for "/".
class HostMemoryTest : public ::testing::Test {
 protected:
  HostMemoryTest() {
    std::string pattern = (fs::temp_directory_path() / "host_memory_XXXXXX").string();
    root_ = ::mkdtemp(pattern.data());
  }
  ~HostMemoryTest() override { fs::remove_all(root_); }

  void put(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  HostMemory read() {
    const Result<HostMemory> memory = read_host_memory(root_);
    EXPECT_TRUE(memory) << (memory ? "" : memory.error().text());
    return memory.value_or(HostMemory{});
  }

  fs::path root_;
};

TEST_F(HostMemoryTest, WithoutCgroupsOnlyTheHostLimits) {
  put("proc/meminfo", kMeminfo);
  EXPECT_EQ(read().host_bytes_free, 5000u * 1024);
  EXPECT_EQ(read().cgroup_bytes_free, kUnlimited);
  EXPECT_EQ(read().bytes_free(), 5000u * 1024);
}

TEST_F(HostMemoryTest, UnreadableMeminfoIsAnErrorThatNamesTheFile) {
  const Result<HostMemory> missing = read_host_memory(root_);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, ErrorCode::kIo);
  EXPECT_NE(missing.error().message.find("proc/meminfo"), std::string::npos);
  put("proc/meminfo", "MemTotal: 9000 kB\nMemAvailableToo: 1 kB\n");
  EXPECT_FALSE(read_host_memory(root_));
  put("proc/meminfo", "MemAvailable: 99999999999999999999 kB\n");
  EXPECT_FALSE(read_host_memory(root_));
}

TEST_F(HostMemoryTest, TheTightestLevelOfNestedV2CgroupsCounts) {
  put("proc/meminfo", kMeminfo);
  put("proc/self/cgroup", "0::/outer/middle/inner\n");
  put("proc/self/mountinfo", kMountV2);
  put("sys/fs/cgroup/outer/memory.max", "900000\n");
  put("sys/fs/cgroup/outer/memory.current", "100000\n");
  put("sys/fs/cgroup/outer/middle/memory.max", "300000\n");
  put("sys/fs/cgroup/outer/middle/memory.current", "100000\n");
  put("sys/fs/cgroup/outer/middle/inner/memory.max", "max\n");
  put("sys/fs/cgroup/outer/middle/inner/memory.current", "100000\n");
  EXPECT_EQ(read().cgroup_bytes_free, 200000u);
  EXPECT_EQ(read().cgroup, (root_ / "sys/fs/cgroup/outer/middle").string());
  EXPECT_EQ(read().bytes_free(), 200000u);
}

TEST_F(HostMemoryTest, TheTightestLevelOfNestedV1CgroupsCounts) {
  put("proc/meminfo", kMeminfo);
  put("proc/self/cgroup", "9:name=systemd:/\n4:memory:/outer/inner\n0::/\n");
  put("proc/self/mountinfo", kMountV1);
  put("sys/fs/cgroup/memory/outer/memory.limit_in_bytes", "500000\n");
  put("sys/fs/cgroup/memory/outer/memory.usage_in_bytes", "450000\n");
  put("sys/fs/cgroup/memory/outer/inner/memory.limit_in_bytes", "9223372036854771712\n");
  put("sys/fs/cgroup/memory/outer/inner/memory.usage_in_bytes", "450000\n");
  EXPECT_EQ(read().cgroup_bytes_free, 50000u);
  EXPECT_EQ(read().cgroup, (root_ / "sys/fs/cgroup/memory/outer").string());
}

TEST_F(HostMemoryTest, TheHugeNumberThatV1ReportsWithoutALimitIsNoLimit) {
  put("proc/meminfo", kMeminfo);
  put("proc/self/cgroup", "4:memory:/\n");
  put("proc/self/mountinfo", kMountV1);
  put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  put("sys/fs/cgroup/memory/memory.usage_in_bytes", "450000\n");
  EXPECT_EQ(read().cgroup_bytes_free, kUnlimited);
  EXPECT_EQ(read().cgroup, "");
}

TEST_F(HostMemoryTest, BothVersionsAtOnceAreRead) {
  put("proc/meminfo", kMeminfo);
  put("proc/self/cgroup", "4:cpu,memory:/a\n0::/b\n");
  put("proc/self/mountinfo",
      std::string(kMountV1) + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
  put("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "1000\n");
  put("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "100\n");
  put("sys/fs/cgroup/unified/b/memory.max", "800\n");
  put("sys/fs/cgroup/unified/b/memory.current", "100\n");
  EXPECT_EQ(read().cgroup_bytes_free, 700u);
}

TEST_F(HostMemoryTest, ACgroupOverItsLimitHasNothingFree) {
  put("proc/meminfo", kMeminfo);
  put("proc/self/cgroup", "0::/a\n");
  put("proc/self/mountinfo", kMountV2);
  put("sys/fs/cgroup/a/memory.max", "1000\n");
  put("sys/fs/cgroup/a/memory.current", "1001\n");
  EXPECT_EQ(read().cgroup_bytes_free, 0u);
}

TEST_F(HostMemoryTest, PageCacheThatCanBeDroppedCountsAsFree) {
  put("proc/meminfo", kMeminfo);
  put("proc/self/cgroup", "0::/a\n");
  put("proc/self/mountinfo", kMountV2);
  put("sys/fs/cgroup/a/memory.max", "1000\n");
  put("sys/fs/cgroup/a/memory.current", "990\n");
  put("sys/fs/cgroup/a/memory.stat", "anon 90\nactive_file 300\ninactive_file 600\n");
  EXPECT_EQ(read().cgroup_bytes_free, 610u);
}

TEST_F(HostMemoryTest, AMountOfTheContainersOwnCgroupIsUnderstood) {
  put("proc/meminfo", kMeminfo);
  put("proc/self/cgroup", "4:memory:/docker/abc/job\n");
  put("proc/self/mountinfo", "35 31 0:32 /docker/abc /cg\\040roups rw - cgroup cgroup rw,memory\n");
  put("cg roups/memory.limit_in_bytes", "1000\n");
  put("cg roups/memory.usage_in_bytes", "600\n");
  put("cg roups/job/memory.limit_in_bytes", "2000\n");
  put("cg roups/job/memory.usage_in_bytes", "600\n");
  EXPECT_EQ(read().cgroup_bytes_free, 400u);
}

TEST_F(HostMemoryTest, GarbageInCgroupFilesLimitsNothing) {
  put("proc/meminfo", kMeminfo);
  put("proc/self/cgroup", "garbage\n0::/a/../../b\n:\n");
  put("proc/self/mountinfo", "short\n1 2 - cgroup2\n" + std::string(kMountV2));
  put("sys/fs/cgroup/memory.max", "");
  put("sys/fs/cgroup/memory.current", "x\n");
  EXPECT_EQ(read().cgroup_bytes_free, kUnlimited);
}

TEST(HostMemory, ThisHostHasSomeMemoryFree) {
  const Result<HostMemory> memory = read_host_memory();
  ASSERT_TRUE(memory);
  EXPECT_GT(memory->bytes_free(), 0u);
}

}  // namespace
}  // namespace strandline::memory
