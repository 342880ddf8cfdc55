// What is particular to the POSIX storage; what every storage promises is in
// tests/conformance/storage_conformance.h.

#include "storage/posix_storage.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "format/names.h"
#include "storage/posix_directory.h"
#include "testing/child_process.h"
#include "testing/temporary_directory.h"

namespace strandline::storage {
namespace {

using testing::ChildProcess;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::MatchesRegex;
using testing::TemporaryDirectory;

Status write_file(PartialDirectory& partial, std::string_view name, std::string_view text) {
  auto file = partial.create(name, text.size());
  if (!file) return failure(file.error());
  Status written;
  (*file)->write_at(0, std::as_bytes(std::span(text)),
                    [&written](Status status) { written = std::move(status); });
  if (!written) return written;
  return (*file)->sync();
}

Result<std::unique_ptr<PartialDirectory>> begin_with(Storage& storage, std::string_view name,
                                                     std::string_view text) {
  auto partial = storage.begin(name);
  if (!partial) return partial;
  if (Status written = write_file(**partial, "data", text); !written) {
    return failure(written.error());
  }
  return partial;
}

Result<Publication> publish(Storage& storage, std::string_view name, std::string_view text,
                            Publish mode) {
  auto partial = begin_with(storage, "." + std::string(name) + ".partial-1", text);
  if (!partial) return failure(partial.error());
  return storage.publish(std::move(*partial), name, mode);
}

std::string text_of(const std::filesystem::path& file) {
  std::ifstream stream(file);
  return {std::istreambuf_iterator<char>(stream), {}};
}

class PosixStorageTest : public ::testing::Test {
 protected:
  std::shared_ptr<Storage> open(const PublishCalls& calls = {}) {
    auto storage = PosixStorage::open_root(root_, calls);
    EXPECT_TRUE(storage) << storage.error().text();
    return storage.value();
  }
  std::vector<std::string> names() { return open()->list().value(); }

  TemporaryDirectory directory_;
  std::filesystem::path root_ = directory_ / "root";
};

// ---- The root ----

TEST_F(PosixStorageTest, OpeningCreatesNothingAndBeginningCreatesTheRootWithItsParents) {
  root_ = directory_ / "a/b/c";
  const auto storage = open();
  EXPECT_FALSE(std::filesystem::exists(directory_ / "a"));
  const auto partial = storage->begin(".s.partial-1");
  ASSERT_TRUE(partial) << partial.error().text();
  EXPECT_TRUE(std::filesystem::is_directory(root_ / ".s.partial-1"));
}

TEST_F(PosixStorageTest, LockingCreatesTheRootWithItsParents) {
  root_ = directory_ / "a/b/c";
  EXPECT_TRUE(open()->lock("here"));
  EXPECT_TRUE(std::filesystem::is_directory(root_));
}

TEST_F(PosixStorageTest, ALinkThatLostItsTargetMeanwhileIsAnErrorThatSaysSo) {
  const auto disk = directory_ / "disk";
  std::filesystem::create_directory(disk);
  std::filesystem::create_symlink(disk, directory_ / "link");
  for (const bool used_before : {false, true}) {
    const auto storage = open_posix_storage(directory_ / "link/run").value();
    if (used_before) {
      ASSERT_TRUE(storage->lock("here"));
    }
    std::filesystem::remove_all(disk);
    for (const Error& error : {storage->lock("here").error(), storage->begin(".p").error()}) {
      EXPECT_EQ(error.code, ErrorCode::kInvalidArgument) << error.text();
      EXPECT_THAT(error.message, HasSubstr("is a disk not mounted?"));
    }
    std::filesystem::create_directory(disk);
  }
  // Where nothing can be created.
  EXPECT_FALSE(open_posix_storage("/proc/nothing").value()->lock("here"));
}

TEST_F(PosixStorageTest, ARootThatWasRemovedMeanwhileIsCreatedAgain) {
  const auto storage = open();
  ASSERT_TRUE(storage->begin(".s.partial-1"));
  std::filesystem::remove_all(root_);
  EXPECT_TRUE(publish(*storage, "s", "x", Publish::kNew));
}

TEST_F(PosixStorageTest, ARelativePathStaysWhereItWasWhenTheProgramGoesElsewhere) {
  ChildProcess child([&]() -> std::string {
    std::filesystem::current_path(directory_.path());
    const auto storage = open_posix_storage("relative/./").value();
    std::filesystem::current_path("/");
    const auto published = publish(*storage, "s", "x", Publish::kNew);
    return published ? storage->path() : published.error().text();
  });
  EXPECT_EQ(child.wait(), (directory_ / "relative").string());
  EXPECT_EQ(text_of(directory_ / "relative/s/data"), "x");
}

TEST_F(PosixStorageTest, ADanglingLinkIsRefusedWithTheLinkNamedAlsoAsAParent) {
  std::filesystem::create_symlink(directory_ / "nowhere", directory_ / "link");
  for (const auto& path : {directory_ / "link", directory_ / "link/below/it"}) {
    const auto storage = open_posix_storage(path);
    ASSERT_FALSE(storage);
    EXPECT_EQ(storage.error().code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(storage.error().path, (directory_ / "link").string());
    EXPECT_THAT(storage.error().message, HasSubstr("create its target"));
  }
}

TEST_F(PosixStorageTest, APlainFileIsRefusedAlsoAsAParent) {
  std::ofstream(directory_ / "file") << "x";
  for (const auto& path : {directory_ / "file", directory_ / "file/below/it"}) {
    const auto storage = open_posix_storage(path);
    ASSERT_FALSE(storage);
    EXPECT_EQ(storage.error().code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(storage.error().path, (directory_ / "file").string());
  }
}

TEST_F(PosixStorageTest, AnEmptyPathIsRefused) {
  EXPECT_EQ(open_posix_storage("").error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(open_posix_storage(std::string("a\0b", 3)).error().code, ErrorCode::kInvalidArgument);
}

TEST_F(PosixStorageTest, ARootBehindALinkWorks) {
  std::filesystem::create_directory(directory_ / "disk");
  std::filesystem::create_directory_symlink(directory_ / "disk", root_);
  ASSERT_TRUE(publish(*open(), "s", "x", Publish::kNew));
  EXPECT_EQ(text_of(directory_ / "disk/s/data"), "x");
}

TEST_F(PosixStorageTest, ADirectoryThatIsNotWritableIsNamedWithTheSystemsReason) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to drop to a user without rights";
  ASSERT_EQ(::chmod(directory_.path().c_str(), 0755), 0);
  std::filesystem::create_directory(root_);
  const auto storage = open();
  constexpr uid_t kNobody = 65534;
  ChildProcess child([&]() -> std::string {
    if (::setgroups(0, nullptr) != 0 || ::setresgid(kNobody, kNobody, kNobody) != 0 ||
        ::setresuid(kNobody, kNobody, kNobody) != 0) {
      return "cannot drop rights";
    }
    const auto partial = storage->begin(".s.partial-1");
    if (partial) return "begin() succeeded";
    const auto lock = storage->lock("here");
    if (lock) return "lock() succeeded";
    for (const Error& error : {partial.error(), lock.error()}) {
      if (error.code != ErrorCode::kIo || error.system_errno != EACCES) return error.text();
      if (error.path.find(root_.string()) != 0) return "wrong path " + error.path;
    }
    return partial.error().message;
  });
  const std::string message = child.wait();
  EXPECT_THAT(message, HasSubstr(root_.string()));
  EXPECT_THAT(message, HasSubstr("Permission denied"));
  EXPECT_THAT(message, HasSubstr("check owner and rights"));
}

// ---- Publishing ----

// Sees each call of publish() and what is on the disk at that moment, and makes chosen ones fail.
struct Witness {
  std::filesystem::path root;
  std::vector<std::string> seen = {};
  std::vector<int> failing = {};  // An errno for each call in turn; 0 and beyond the end: none.
  bool refuse_exchange = false;

  PublishCalls calls() {
    PublishCalls calls;
    calls.sync = [this, next = calls.sync](int fd) {
      const std::string path =
          std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd)).filename();
      seen.push_back("sync " + path + ": " + state());
      return fail() ? -1 : next(fd);
    };
    calls.rename = [this, next = calls.rename](int directory, const char* from, const char* to,
                                               unsigned flags) {
      if (refuse_exchange && (flags & RENAME_EXCHANGE) != 0) {
        errno = EINVAL;
        return -1;
      }
      if (fail()) return -1;
      return next(directory, from, to, flags);
    };
    return calls;
  }
  bool fail() {
    const std::size_t call = counted++;
    if (call >= failing.size() || failing[call] == 0) return false;
    errno = failing[call];
    return true;
  }
  // "s=new .s.partial-1=old": each directory with its content.
  [[nodiscard]] std::string state() const {
    std::vector<std::string> parts;
    for (const auto& entry : std::filesystem::directory_iterator(root)) {
      std::string name = entry.path().filename();
      const std::size_t id = name.find(".replaced-");
      if (id != std::string::npos) name.resize(id + std::strlen(".replaced-"));
      parts.push_back(name + "=" + text_of(entry.path() / "data"));
    }
    std::sort(parts.begin(), parts.end());
    std::string text;
    for (const std::string& part : parts) text += (text.empty() ? "" : " ") + part;
    return text;
  }

  std::size_t counted = 0;
};

TEST_F(PosixStorageTest, ANewStepIsSyncedRenamedAndItsRootSynced) {
  Witness witness{.root = root_};
  ASSERT_TRUE(publish(*open(witness.calls()), "s", "new", Publish::kNew));
  EXPECT_THAT(witness.seen, ElementsAre("sync .s.partial-1: .s.partial-1=new", "sync root: s=new"));
}

TEST_F(PosixStorageTest, WhatIsReplacedStaysUntilTheRootIsSynced) {
  for (const bool refuse_exchange : {false, true}) {
    ASSERT_TRUE(publish(*open(), "s", "old", Publish::kReplace));
    Witness witness{.root = root_, .refuse_exchange = refuse_exchange};
    ASSERT_TRUE(publish(*open(witness.calls()), "s", "new", Publish::kReplace));
    const std::string aside = refuse_exchange ? ".s.replaced-=old" : ".s.partial-1=old";
    EXPECT_THAT(witness.seen, ElementsAre("sync .s.partial-1: .s.partial-1=new s=old",
                                          "sync root: " + aside + " s=new"));
    EXPECT_EQ(witness.state(), "s=new");
  }
}

TEST_F(PosixStorageTest, AnyFailureBeforeTheStepIsVisibleChangesNothing) {
  for (const bool refuse_exchange : {false, true}) {
    const std::size_t calls_before_visible = refuse_exchange ? 3 : 2;
    for (std::size_t failing = 0; failing < calls_before_visible; ++failing) {
      ASSERT_TRUE(publish(*open(), "s", "old", Publish::kReplace));
      Witness witness{.root = root_,
                      .failing = std::vector<int>(failing, 0),
                      .refuse_exchange = refuse_exchange};
      witness.failing.push_back(EIO);
      const auto published = publish(*open(witness.calls()), "s", "new", Publish::kReplace);
      ASSERT_FALSE(published);
      EXPECT_EQ(published.error().code, ErrorCode::kIo);
      EXPECT_EQ(published.error().system_errno, EIO);
      EXPECT_EQ(witness.state(), "s=old") << "after failure of call " << failing;
    }
  }
}

TEST_F(PosixStorageTest, IfTheOldStepCannotBeMovedBackTheErrorSaysWhereItLies) {
  ASSERT_TRUE(publish(*open(), "s", "old", Publish::kNew));
  Witness witness{.root = root_, .failing = {0, 0, EIO, EROFS}, .refuse_exchange = true};
  const auto published = publish(*open(witness.calls()), "s", "new", Publish::kReplace);
  ASSERT_FALSE(published);
  EXPECT_EQ(witness.state(), ".s.replaced-=old");
  EXPECT_THAT(published.error().message, HasSubstr(root_.string() + "/" + names().front()));
}

TEST_F(PosixStorageTest, ARootThatCannotBeSyncedLeavesTheStepVisibleAndTheOldOneInPlace) {
  ASSERT_TRUE(publish(*open(), "s", "old", Publish::kNew));
  Witness witness{.root = root_, .failing = {0, 0, EIO}};
  const auto published = publish(*open(witness.calls()), "s", "new", Publish::kReplace);
  ASSERT_TRUE(published) << published.error().text();
  ASSERT_FALSE(published->durable);
  EXPECT_EQ(published->durable.error().system_errno, EIO);
  EXPECT_EQ(published->durable.error().path, root_.string());
  EXPECT_EQ(witness.state(), ".s.partial-1=old s=new");
  EXPECT_TRUE(open()->remove_if_abandoned(".s.partial-1"));
  EXPECT_EQ(witness.state(), "s=new");
}

TEST_F(PosixStorageTest, NobodySweepsWhatIsBeingReplacedBeforeTheRootIsSynced) {
  ASSERT_TRUE(publish(*open(), "s", "old", Publish::kNew));
  PublishCalls calls;
  const auto sweeper = open();
  std::string at_sync;
  calls.sync = [&, next = calls.sync](int fd) {
    EXPECT_TRUE(sweeper->remove_if_abandoned(".s.partial-1"));
    at_sync = Witness{.root = root_}.state();
    return next(fd);
  };
  ASSERT_TRUE(publish(*open(calls), "s", "new", Publish::kReplace));
  EXPECT_EQ(at_sync, ".s.partial-1=old s=new");
}

TEST_F(PosixStorageTest, AReplacedStepIsNamedAsReadersExpectWhileItIsAside) {
  ASSERT_TRUE(publish(*open(), "step-00000001", "old", Publish::kNew));
  Witness witness{.root = root_, .failing = {0, 0, 0, EIO}, .refuse_exchange = true};
  ASSERT_TRUE(publish(*open(witness.calls()), "step-00000001", "new", Publish::kReplace));
  EXPECT_THAT(names(),
              ElementsAre(MatchesRegex("\\.step-00000001\\.replaced-[0-9a-f]+"), "step-00000001"));
  const auto parsed = format::parse_directory_name(names().front());
  EXPECT_EQ(parsed.kind, format::DirectoryName::Kind::kReplaced);
  EXPECT_EQ(parsed.final_name, "step-00000001");
}

TEST_F(PosixStorageTest, ADirectoryOfAnotherStorageIsNotPublished) {
  const auto other = open_posix_storage(directory_ / "other").value();
  auto partial = other->begin(".s.partial-1");
  ASSERT_TRUE(partial);
  EXPECT_EQ(open()->publish(std::move(*partial), "s", Publish::kNew).error().code,
            ErrorCode::kInvalidArgument);
}

// ---- Forked children ----

TEST_F(PosixStorageTest, AForkedChildsCopyOfAPartialDirectoryRemovesAndPublishesNothing) {
  const auto storage = open();
  auto partial = begin_with(*storage, ".s.partial-1", "x");
  ASSERT_TRUE(partial);
  for (const bool publishes : {false, true}) {
    ChildProcess child([&]() -> std::string {
      if (!publishes) {
        partial->reset();
        return "unavailable";
      }
      const auto published = storage->publish(std::move(*partial), "s", Publish::kNew);
      return std::string(published ? "published" : error_code_name(published.error().code));
    });
    EXPECT_EQ(child.wait(), "unavailable");
    EXPECT_THAT(names(), ElementsAre(".s.partial-1"));
  }
  EXPECT_TRUE(storage->publish(std::move(*partial), "s", Publish::kNew));
}

TEST_F(PosixStorageTest, AForkedChildDoesNotKeepItsDeadParentsPartialDirectoryAlive) {
  const auto storage = open();
  testing::Pipe begun;
  testing::Pipe end;
  ChildProcess parent([&]() -> std::string {
    end.in.reset();
    const auto partial = begin_with(*storage, ".s.partial-1", "x");
    if (!partial) return partial.error().text();
    if (::fork() == 0) {  // The data loading worker.
      begun.send();
      static_cast<void>(end.receive());
      ::_exit(0);
    }
    ::kill(::getpid(), SIGKILL);
    return "survived";
  });
  ASSERT_TRUE(begun.receive());
  EXPECT_EQ(parent.wait(), "killed by signal 9");
  EXPECT_THAT(names(), ElementsAre(".s.partial-1"));
  EXPECT_TRUE(storage->remove_if_abandoned(".s.partial-1"));
  EXPECT_THAT(names(), IsEmpty());
}

// ---- Removing ----

TEST_F(PosixStorageTest, LeftoversOfEveryKindAreRemovedInPlace) {
  std::filesystem::create_directories(root_ / ".s.deleting/deep/er");
  std::filesystem::create_directories(root_ / ".s.replaced-1");
  std::ofstream(root_ / ".s.partial-1") << "a file";
  std::filesystem::create_symlink("/etc", root_ / ".t.partial-1");
  const auto storage = open();
  for (const std::string& name : names()) EXPECT_TRUE(storage->remove_if_abandoned(name)) << name;
  EXPECT_THAT(names(), IsEmpty());
}

TEST_F(PosixStorageTest, RemovingAStepFirstClearsWhatAnEarlierRemovalLeft) {
  const auto storage = open();
  ASSERT_TRUE(publish(*storage, "s", "x", Publish::kNew));
  std::filesystem::create_directories(root_ / ".s.deleting/rest");
  EXPECT_TRUE(storage->remove("s"));
  EXPECT_THAT(names(), IsEmpty());
}

TEST_F(PosixStorageTest, AStepGoesOutOfSightBeforeItsFilesGo) {
  const auto storage = open();
  ASSERT_TRUE(publish(*storage, "s", "x", Publish::kNew));
  // More levels than are followed, so that the removal ends early.
  std::filesystem::path deep = root_ / "s";
  for (int i = 0; i < 40; ++i) deep /= "d";
  std::filesystem::create_directories(deep);
  EXPECT_FALSE(storage->remove("s"));
  EXPECT_THAT(names(), ElementsAre(".s.deleting"));
  const auto parsed = format::parse_directory_name(names().front());
  EXPECT_EQ(parsed.kind, format::DirectoryName::Kind::kDeleting);
  EXPECT_EQ(parsed.final_name, "s");
}

TEST_F(PosixStorageTest, AStepIsNeverTakenForALeftover) {
  const auto storage = open();
  ASSERT_TRUE(publish(*storage, "s", "x", Publish::kNew));
  EXPECT_EQ(storage->remove_if_abandoned("s").error().code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(names(), ElementsAre("s"));
}

TEST_F(PosixStorageTest, TheLockIsNoNameToUse) {
  const auto storage = open();
  ASSERT_TRUE(storage->lock("here"));
  EXPECT_EQ(storage->remove(".lock").error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(storage->remove_if_abandoned(".lock").error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(storage->begin(".lock").error().code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(names(), ElementsAre(".lock"));
}

// ---- Reading ----

TEST_F(PosixStorageTest, WhatIsNotAPlainFileIsNotReadAndDoesNotBlock) {
  const auto storage = open();
  ASSERT_TRUE(publish(*storage, "s", "x", Publish::kNew));
  ASSERT_EQ(::mkfifo((root_ / "s/pipe").c_str(), 0600), 0);
  std::filesystem::create_symlink("data", root_ / "s/link");
  std::filesystem::create_directory(root_ / "s/directory");
  const auto step = storage->open("s");
  ASSERT_TRUE(step);
  std::vector<std::byte> bytes(1);
  for (const char* name : {"pipe", "link", "directory"}) {
    EXPECT_EQ((*step)->file_bytes(name).error().code, ErrorCode::kNotFound) << name;
    EXPECT_EQ((*step)->read_at(name, 0, bytes).error().code, ErrorCode::kNotFound) << name;
  }
}

TEST_F(PosixStorageTest, AFileUnderAStepsNameIsNotFoundAsAStep) {
  std::filesystem::create_directory(root_);
  std::ofstream(root_ / "s") << "x";
  const auto step = open()->open("s");
  ASSERT_FALSE(step);
  EXPECT_EQ(step.error().code, ErrorCode::kNotFound);
  EXPECT_THAT(step.error().message, HasSubstr("not a directory"));
}

TEST_F(PosixStorageTest, AStepMovedElsewhereBehindALinkIsRead) {
  const auto storage = open();
  ASSERT_TRUE(publish(*storage, "s", "x", Publish::kNew));
  std::filesystem::rename(root_ / "s", directory_ / "elsewhere");
  std::filesystem::create_directory_symlink(directory_ / "elsewhere", root_ / "s");
  const auto step = storage->open("s");
  ASSERT_TRUE(step) << step.error().text();
  EXPECT_EQ((*step)->file_bytes("data").value(), 1);
}

TEST_F(PosixStorageTest, ManyThreadsReadMoreFilesThanStayOpen) {
  const auto storage = open();
  auto partial = storage->begin(".s.partial-1");
  ASSERT_TRUE(partial);
  constexpr std::size_t kFiles = 3 * kOpenFilesMax;
  for (std::size_t i = 0; i < kFiles; ++i) {
    ASSERT_TRUE(write_file(**partial, "file" + std::to_string(i), std::to_string(i)));
  }
  ASSERT_TRUE(storage->publish(std::move(*partial), "s", Publish::kNew));
  const auto step = storage->open("s").value();

  std::atomic<std::size_t> wrong = 0;
  std::vector<std::thread> readers;
  for (std::size_t reader = 0; reader < 4; ++reader) {
    readers.emplace_back([&, reader] {
      for (std::size_t i = 0; i < 200; ++i) {
        const std::size_t file = (i * (2 * reader + 1)) % kFiles;
        const std::string expected = std::to_string(file);
        std::string text(expected.size(), ' ');
        const Status read =
            step->read_at("file" + expected, 0, std::as_writable_bytes(std::span(text)));
        if (!read || text != expected) ++wrong;
      }
    });
  }
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(wrong, 0);
  std::size_t open_files = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const auto target = std::filesystem::read_symlink(entry.path(), gone);
    if (target.parent_path() == root_ / "s") ++open_files;
  }
  EXPECT_EQ(open_files, kOpenFilesMax);
}

TEST_F(PosixStorageTest, NoDescriptorIsLeftOpenOrInheritedByPrograms) {
  const auto count = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {});
  };
  const auto before = count();
  {
    const auto storage = open();
    const auto lock = storage->lock("here");
    ASSERT_TRUE(publish(*storage, "s", "old", Publish::kNew));
    ASSERT_TRUE(publish(*storage, "s", "new", Publish::kReplace));
    auto partial = begin_with(*storage, ".t.partial-1", "x");
    const auto file = (*partial)->create("open", 1);
    const auto step = storage->open("s");
    ASSERT_TRUE((*step)->file_bytes("data"));
    for (int fd = 3; fd < 64; ++fd) {
      const int flags = ::fcntl(fd, F_GETFD);
      if (flags < 0 || (flags & FD_CLOEXEC) != 0) continue;
      const auto target = std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd));
      EXPECT_THAT(target.string(), ::testing::Not(HasSubstr(root_.string())));
    }
  }
  EXPECT_EQ(count(), before);
}

// ---- A full disk ----

// In a file system of its own with 1 MiB of space; what went wrong, or nothing.
std::string fill_a_small_disk(const std::filesystem::path& mount_point) {
  if (::unshare(CLONE_NEWNS) != 0 ||
      ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
      ::mount("tmpfs", mount_point.c_str(), "tmpfs", 0, "size=1m") != 0) {
    return std::string("skip: ") + std::strerror(errno);
  }
  const auto storage = open_posix_storage(mount_point / "root").value();
  const auto is_full = [](const Error& error) {
    return error.code == ErrorCode::kIo && error.system_errno == ENOSPC &&
           error.message.find("free space") != std::string::npos && !error.path.empty();
  };
  if (auto small = publish(*storage, "kept", "small", Publish::kNew); !small) {
    return small.error().text();
  }
  {
    auto partial = storage->begin(".s.partial-1").value();
    const auto reserved = partial->create("reserved", 16 << 20);
    if (reserved) return "more space than there is was reserved";
    if (!is_full(reserved.error())) return "reserving: " + reserved.error().text();
  }
  // As where space cannot be reserved: found out while writing.
  const Status written =
      write_file(*storage->begin(".s.partial-1").value(), "data", std::string(900 << 10, 'x'));
  if (!written) return "900 KiB of 1 MiB: " + written.error().text();
  auto partial = storage->begin(".s.partial-1").value();
  const auto file = partial->create("data", 0).value();
  const std::string text(2 << 20, 'x');
  Status status;
  file->write_at(0, std::as_bytes(std::span(text)), [&](Status s) { status = std::move(s); });
  if (status) return "2 MiB were written to 1 MiB";
  if (!is_full(status.error())) return "writing: " + status.error().text();
  if (file->sync()) return "a file that was not written in full was synced";
  partial.reset();
  // Nothing is left behind, and what was there is intact.
  const auto again = publish(*storage, "s", std::string(900 << 10, 'x'), Publish::kNew);
  if (!again) return "after the disk was freed: " + again.error().text();
  if (text_of(mount_point / "root/kept/data") != "small") return "an older step was lost";
  return "";
}

TEST(PosixStorageOnAFullDisk, SaysSoLosesNothingAndGoesOnOnceThereIsSpace) {
  const TemporaryDirectory mount_point;
  ChildProcess child([&] { return fill_a_small_disk(mount_point.path()); });
  const std::string result = child.wait();
  if (result.starts_with("skip: ")) GTEST_SKIP() << "cannot mount a small tmpfs: " << result;
  EXPECT_EQ(result, "");
}

}  // namespace
}  // namespace strandline::storage
