#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "storage/process_lock.h"
#include "strandline/storage.h"
#include "testing/child_process.h"
#include "testing/temporary_directory.h"

namespace strandline::storage {
namespace {

using testing::ChildProcess;
using ::testing::HasSubstr;
using testing::Pipe;

class WriterLockTest : public ::testing::Test {
 protected:
  testing::TemporaryDirectory directory_;
  std::shared_ptr<Storage> storage_ = open_posix_storage(directory_ / "root").value();

  // What another process gets: "locked", or the error's text.
  [[nodiscard]] std::string lock_in_child() {
    ChildProcess child([this] {
      const auto lock = storage_->lock("child.py:1");
      return lock ? std::string("locked") : lock.error().text();
    });
    return child.wait();
  }
  [[nodiscard]] bool is_free() {
    const auto lock = open_posix_storage(directory_ / "root").value()->lock("probe");
    if (lock) return true;
    EXPECT_EQ(lock.error().code, ErrorCode::kUnavailable) << lock.error().text();
    return false;
  }
};

TEST_F(WriterLockTest, TheErrorNamesDirectoryHostProcessPlaceAndRemedy) {
  const auto lock = storage_->lock("train \"v2\".py:12");
  ASSERT_TRUE(lock) << lock.error().text();
  const std::string refused = lock_in_child();
  std::string host(256, '\0');
  ASSERT_EQ(::gethostname(host.data(), host.size()), 0);
  EXPECT_THAT(refused, HasSubstr(storage_->path()));
  EXPECT_THAT(refused, HasSubstr(host.c_str()));
  EXPECT_THAT(refused, HasSubstr("process " + std::to_string(::getpid())));
  EXPECT_THAT(refused, HasSubstr("train \"v2\".py:12"));
  EXPECT_THAT(refused, HasSubstr("choose another directory"));
}

TEST_F(WriterLockTest, TheSameProcessIsToldThatItHoldsTheLockItself) {
  const auto lock = storage_->lock("here");
  ASSERT_TRUE(lock);
  EXPECT_THAT(storage_->lock("there").error().message, HasSubstr("this very process"));
}

TEST_F(WriterLockTest, ReleasingItLetsTheNextInAndKeepsTheFile) {
  auto lock = storage_->lock("here");
  ASSERT_TRUE(lock);
  EXPECT_FALSE(is_free());
  lock->reset();
  EXPECT_TRUE(is_free());
  EXPECT_TRUE(std::filesystem::exists(storage_->path() + "/.lock"));
}

TEST_F(WriterLockTest, ALockWhoseFileWasRemovedKeepsNobodyOutAndSaysSo) {
  for (const char* removed : {"root/.lock", "root"}) {
    const auto lock = storage_->lock("here");
    ASSERT_TRUE(lock);
    EXPECT_TRUE((*lock)->held());
    std::filesystem::remove_all(directory_ / removed);
    EXPECT_FALSE((*lock)->held()) << removed;
    const auto other = open_posix_storage(directory_ / "root").value()->lock("there");
    ASSERT_TRUE(other);
    EXPECT_TRUE((*other)->held());
    EXPECT_FALSE((*lock)->held()) << "the file is another's";
  }
}

TEST_F(WriterLockTest, AnUnreadableHolderStillRefusesTheSecond) {
  const auto lock = storage_->lock("here");
  ASSERT_TRUE(lock);
  for (const char* content : {"", "{", "[1]", R"({"host": 3})", "\xff\xfe"}) {
    std::ofstream(storage_->path() + "/.lock", std::ios::trunc) << content;
    EXPECT_THAT(lock_in_child(), HasSubstr("has not said who it is"));
  }
}

TEST_F(WriterLockTest, AKilledHolderLeavesNoLock) {
  Pipe locked;
  ChildProcess holder([&] {
    const auto lock = storage_->lock("holder");
    if (!lock) return lock.error().text();
    locked.send();
    while (true) ::pause();
  });
  ASSERT_TRUE(locked.receive());
  EXPECT_FALSE(is_free());
  holder.kill();
  EXPECT_EQ(holder.wait(), "killed by signal 9");
  EXPECT_TRUE(is_free());
}

TEST_F(WriterLockTest, AForkedChildDoesNotKeepTheLockThatItsParentReleased) {
  auto lock = storage_->lock("parent");
  ASSERT_TRUE(lock);
  Pipe running;
  Pipe end;
  ChildProcess child([&] {
    end.in.reset();
    running.send();
    static_cast<void>(end.receive());
    return std::string("ended");
  });
  ASSERT_TRUE(running.receive());
  EXPECT_FALSE(is_free());
  lock->reset();
  EXPECT_TRUE(is_free());
  end.in.reset();
  EXPECT_EQ(child.wait(), "ended");
}

TEST_F(WriterLockTest, AForkedChildDoesNotKeepTheLockOfAParentThatDied) {
  Pipe running;
  Pipe end;
  ChildProcess parent([&] {
    end.in.reset();
    const auto lock = storage_->lock("parent");
    if (!lock) return lock.error().text();
    if (::fork() == 0) {  // The data loading worker.
      running.send();
      static_cast<void>(end.receive());
      ::_exit(0);
    }
    static_cast<void>(::kill(::getpid(), SIGKILL));
    return std::string("survived");
  });
  ASSERT_TRUE(running.receive());
  EXPECT_EQ(parent.wait(), "killed by signal 9");
  EXPECT_TRUE(is_free());  // The worker waits until `end` goes.
}

TEST_F(WriterLockTest, AForkedChildCanNeitherStealNorReleaseItsParentsLock) {
  auto lock = storage_->lock("parent");
  ASSERT_TRUE(lock);
  EXPECT_THAT(lock_in_child(), HasSubstr("opened at parent"));
  ChildProcess child([&] {
    lock->reset();  // Its copy of the parent's lock.
    return std::string("ended");
  });
  EXPECT_EQ(child.wait(), "ended");
  EXPECT_FALSE(is_free());
}

TEST_F(WriterLockTest, AForkedChildsCopyOfALockClosesNoDescriptorOfTheChild) {
  auto lock = storage_->lock("parent");
  ASSERT_TRUE(lock);
  ChildProcess child([&] {
    // Takes all numbers that the fork has freed, then destroys the copy.
    std::vector<int> taken;
    for (int i = 0; i < 64; ++i) taken.push_back(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    lock->reset();
    for (const int fd : taken) {
      if (::fcntl(fd, F_GETFD) < 0) return std::string("a descriptor was closed");
    }
    return std::string("all open");
  });
  EXPECT_EQ(child.wait(), "all open");
}

TEST_F(WriterLockTest, AForkedChildMayLockOnceItsParentDoesNot) {
  EXPECT_TRUE(is_free());
  EXPECT_EQ(lock_in_child(), "locked");
}

TEST_F(WriterLockTest, MoreLocksThanTheTableHoldsAreRefusedAndRefusedLocksAreNotHeld) {
  const testing::TemporaryDirectory directory;
  const base::UniqueFd root(::open(directory.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  std::vector<ProcessLock> locks;
  for (std::size_t i = 0; i < kProcessLocksMax; ++i) {
    auto lock = ProcessLock::try_acquire(root.get(), std::to_string(i), O_RDWR | O_CREAT, "file");
    ASSERT_TRUE(lock) << lock.error().text();
    ASSERT_TRUE(*lock);
    locks.push_back(std::move(**lock));
  }
  const auto refused = ProcessLock::try_acquire(root.get(), "more", O_RDWR | O_CREAT, "file");
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kUnavailable);
  locks.pop_back();
  const auto lock = ProcessLock::try_acquire(root.get(), "more", O_RDWR | O_CREAT, "file");
  ASSERT_TRUE(lock) << lock.error().text();
  EXPECT_TRUE(*lock);
}

}  // namespace
}  // namespace strandline::storage
