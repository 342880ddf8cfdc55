#include "storage/posix_calls.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "testing/temporary_directory.h"

namespace strandline::storage {
namespace {

using ::testing::HasSubstr;

// A device that takes and gives three bytes at a time and is interrupted before each transfer.
struct LazyDevice {
  static inline std::string content;
  static inline bool interrupt = false;
  static inline std::vector<std::size_t> wanted;

  static void reset(std::string initial) {
    content = std::move(initial);
    interrupt = true;
    wanted.clear();
  }
  static bool is_interrupted() {
    interrupt = !interrupt;
    if (interrupt) return false;
    errno = EINTR;
    return true;
  }
  static ssize_t write(int, const void* bytes, std::size_t count, off_t offset) {
    if (is_interrupted()) return -1;
    wanted.push_back(count);
    const std::size_t taken = std::min<std::size_t>(count, 3);
    content.resize(std::max(content.size(), static_cast<std::size_t>(offset) + taken));
    std::memcpy(content.data() + offset, bytes, taken);
    return static_cast<ssize_t>(taken);
  }
  static ssize_t read(int, void* bytes, std::size_t count, off_t offset) {
    if (is_interrupted()) return -1;
    const std::size_t at = std::min(static_cast<std::size_t>(offset), content.size());
    const std::size_t given = std::min({count, std::size_t{3}, content.size() - at});
    std::memcpy(bytes, content.data() + at, given);
    return static_cast<ssize_t>(given);
  }
  static ssize_t take_all(int, const void*, std::size_t count, off_t) {
    wanted.push_back(count);
    return static_cast<ssize_t>(count);
  }
  static ssize_t take_nothing(int, const void*, std::size_t, off_t) { return 0; }
};

TEST(PosixCalls, ShortAndInterruptedWritesAreContinued) {
  LazyDevice::reset("..");
  const std::string text = "0123456789";
  ASSERT_TRUE(write_all(-1, 2, std::as_bytes(std::span(text)), "file", LazyDevice::write));
  EXPECT_EQ(LazyDevice::content, "..0123456789");
}

TEST(PosixCalls, ShortAndInterruptedReadsAreContinued) {
  LazyDevice::reset("..0123456789");
  std::string text(10, ' ');
  ASSERT_TRUE(read_all(-1, 2, std::as_writable_bytes(std::span(text)), "file", LazyDevice::read));
  EXPECT_EQ(text, "0123456789");
}

TEST(PosixCalls, AFileThatEndsBeforeTheRangeIsCorrupt) {
  LazyDevice::reset("0123");
  std::string text(5, ' ');
  const Status status =
      read_all(-1, 0, std::as_writable_bytes(std::span(text)), "file", LazyDevice::read);
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(status.error().path, "file");
}

TEST(PosixCalls, TransfersAreCutSoThatNoSystemCutsThemShort) {
  LazyDevice::reset("");
  // 3 GiB + 1 of addresses without memory behind them; nothing reads them.
  const std::size_t bytes = 3 * kTransferBytesMax + 1;
  void* const range =
      ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(range, MAP_FAILED);
  const Status status =
      write_all(-1, 0, {static_cast<const std::byte*>(range), bytes}, "file", LazyDevice::take_all);
  ::munmap(range, bytes);
  ASSERT_TRUE(status);
  EXPECT_EQ(LazyDevice::wanted,
            (std::vector<std::size_t>{kTransferBytesMax, kTransferBytesMax, kTransferBytesMax, 1}));
}

TEST(PosixCalls, ADeviceThatTakesNothingIsAnErrorAndNotAnEndlessLoop) {
  const std::string text = "x";
  const Status status =
      write_all(-1, 0, std::as_bytes(std::span(text)), "file", LazyDevice::take_nothing);
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code, ErrorCode::kIo);
}

TEST(PosixCalls, OffsetsBeyondTheLargestFileAreRefused) {
  const std::string text = "xy";
  const std::uint64_t last = std::numeric_limits<std::int64_t>::max();
  const auto write_at = [&text](std::uint64_t offset) {
    return write_all(-1, offset, std::as_bytes(std::span(text)), "file", LazyDevice::take_all);
  };
  EXPECT_TRUE(write_at(last - 2));
  for (const std::uint64_t offset : {last - 1, last, std::numeric_limits<std::uint64_t>::max()}) {
    const Status status = write_at(offset);
    ASSERT_FALSE(status) << offset;
    EXPECT_EQ(status.error().code, ErrorCode::kInvalidArgument);
  }
}

TEST(PosixCalls, ErrorsNameTheOperationThePathAndTheReason) {
  const std::string text = "x";
  const Status status = write_all(-1, 0, std::as_bytes(std::span(text)), "/some/file");
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().system_errno, EBADF);
  EXPECT_THAT(status.error().message, HasSubstr("write '/some/file'"));
}

class RemoveTree : public ::testing::Test {
 protected:
  RemoveTree() : root_(::open(directory_.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {}
  Status remove(const std::string& name) {
    return remove_tree(root_.get(), name, directory_.path().string());
  }

  testing::TemporaryDirectory directory_;
  base::UniqueFd root_;
};

TEST_F(RemoveTree, RemovesFilesLinksPipesAndDirectoriesWithin) {
  std::filesystem::create_directories(directory_ / "step/a/b/c");
  std::ofstream(directory_ / "step/a/file") << "x";
  ASSERT_EQ(::mkfifo((directory_ / "step/pipe").c_str(), 0600), 0);
  std::filesystem::create_symlink("nowhere", directory_ / "step/dangling");
  EXPECT_TRUE(remove("step"));
  EXPECT_FALSE(std::filesystem::exists(directory_ / "step"));
}

TEST_F(RemoveTree, NeverFollowsALink) {
  std::filesystem::create_directories(directory_ / "precious");
  std::ofstream(directory_ / "precious/file") << "x";
  std::filesystem::create_directories(directory_ / "step");
  std::filesystem::create_directory_symlink(directory_ / "precious", directory_ / "step/link");
  std::filesystem::create_directory_symlink(directory_ / "precious", directory_ / "link");
  EXPECT_TRUE(remove("step"));
  EXPECT_TRUE(remove("link"));
  EXPECT_FALSE(std::filesystem::is_symlink(directory_ / "link"));
  EXPECT_TRUE(std::filesystem::exists(directory_ / "precious/file"));
}

TEST_F(RemoveTree, GivesUpOnTreesThatNoCheckpointHas) {
  std::filesystem::path deep = directory_ / "step";
  for (int i = 0; i <= kRemoveDepthMax; ++i) deep /= "d";
  std::filesystem::create_directories(deep);
  const Status status = remove("step");
  ASSERT_FALSE(status);
  EXPECT_THAT(status.error().message, HasSubstr("by hand"));
}

}  // namespace
}  // namespace strandline::storage
