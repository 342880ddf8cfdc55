#include "storage/posix_file.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cerrno>
#include <optional>
#include <span>
#include <string>

#include "testing/child_process.h"
#include "testing/temporary_directory.h"

namespace strandline::storage {
namespace {

using ::testing::HasSubstr;

Status write(WritableFile& file, std::uint64_t offset, std::string_view text) {
  std::optional<Status> result;
  file.write_at(offset, std::as_bytes(std::span(text)),
                [&result](Status status) { result = std::move(status); });
  EXPECT_TRUE(result) << "write_at returned before its completion";
  return result ? *std::move(result) : failure(ErrorCode::kTimeout, "not completed");
}

TEST(PosixFile, AFullDeviceIsAnErrorWithErrnoAndRemedyAndRemembered) {
  PosixWritableFile file(base::UniqueFd(::open("/dev/full", O_WRONLY | O_CLOEXEC)), "/dev/full");
  const Status written = write(file, 0, "x");
  ASSERT_FALSE(written);
  EXPECT_EQ(written.error().code, ErrorCode::kIo);
  EXPECT_EQ(written.error().system_errno, ENOSPC);
  EXPECT_THAT(written.error().message, HasSubstr("free space"));
  const Status synced = file.sync();
  ASSERT_FALSE(synced);
  EXPECT_EQ(synced.error().system_errno, ENOSPC);
}

TEST(PosixFile, AFailedSyncFailsAgainAndIsNeverForgiven) {
  testing::Pipe pipe;  // Cannot be synced.
  PosixWritableFile file(std::move(pipe.in), "file");
  EXPECT_EQ(file.sync().error().system_errno, EINVAL);
  EXPECT_EQ(file.sync().error().system_errno, EINVAL);
}

TEST(PosixFile, AFileThatWasSyncedTakesNoMoreWrites) {
  const testing::TemporaryDirectory directory;
  auto file = PosixWritableFile::create(AT_FDCWD, directory / "file", 1, "file");
  ASSERT_TRUE(file) << file.error().text();
  EXPECT_TRUE(write(**file, 0, "x"));
  EXPECT_TRUE((*file)->sync());
  EXPECT_TRUE((*file)->sync());
  EXPECT_EQ(write(**file, 0, "y").error().code, ErrorCode::kInvalidArgument);
  EXPECT_TRUE((*file)->sync());
}

TEST(PosixFile, SpaceIsReservedButTheSizeIsWhatWasWritten) {
  const testing::TemporaryDirectory directory;
  const std::uint64_t bytes = 4 * kReserveBytesMin;
  auto file = PosixWritableFile::create(AT_FDCWD, directory / "file", bytes, "file");
  ASSERT_TRUE(file) << file.error().text();
  EXPECT_TRUE(write(**file, 0, "x"));
  EXPECT_TRUE((*file)->sync());
  EXPECT_EQ(std::filesystem::file_size(directory / "file"), 1);
}

TEST(PosixFile, AnExistingFileOrLinkIsNeverWrittenThrough) {
  const testing::TemporaryDirectory directory;
  std::filesystem::create_symlink(directory / "target", directory / "link");
  const auto file = PosixWritableFile::create(AT_FDCWD, directory / "link", 1, "link");
  ASSERT_FALSE(file);
  EXPECT_EQ(file.error().code, ErrorCode::kAlreadyExists);
  EXPECT_FALSE(std::filesystem::exists(directory / "target"));
}

TEST(PosixFile, NewFilesFollowTheUsersMask) {
  const testing::TemporaryDirectory directory;
  const mode_t before = ::umask(0027);
  const auto file = PosixWritableFile::create(AT_FDCWD, directory / "file", 1, "file");
  ::umask(before);
  ASSERT_TRUE(file);
  EXPECT_EQ(std::filesystem::status(directory / "file").permissions(),
            static_cast<std::filesystem::perms>(0640));
}

}  // namespace
}  // namespace strandline::storage
