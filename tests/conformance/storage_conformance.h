/// @file
/// What every Storage promises, as tests that run against each implementation:
///
///   struct PosixFactory {
///     static std::shared_ptr<Storage> open(const std::filesystem::path& root);
///   };
///   INSTANTIATE_TYPED_TEST_SUITE_P(Posix, StorageConformance, PosixFactory, );
///
/// `open` gives a storage that keeps everything below `root`, which may not exist yet; two storages
/// with one root see the same steps.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "strandline/storage.h"
#include "testing/temporary_directory.h"

namespace strandline::testing {

using Names = std::vector<std::string>;

inline std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

// Writes and syncs one file; what its completion said comes first.
inline Status write_file(PartialDirectory& partial, std::string_view name, std::string_view text) {
  auto file = partial.create(name, text.size());
  if (!file) return failure(file.error());
  std::optional<Status> written;
  (*file)->write_at(0, bytes_of(text), [&written](Status status) { written = std::move(status); });
  if (!written) return failure(ErrorCode::kTimeout, "write_at has not completed");
  if (!*written) return failure(written->error());
  return (*file)->sync();
}

inline Result<std::string> read_file(ReadableDirectory& step, std::string_view name) {
  const auto bytes = step.file_bytes(name);
  if (!bytes) return failure(bytes.error());
  std::string text(static_cast<std::size_t>(*bytes), '\0');
  const Status read = step.read_at(name, 0, std::as_writable_bytes(std::span(text)));
  if (!read) return failure(read.error());
  return text;
}

// A step `name` with the one file "data".
inline Result<Publication> publish_text(Storage& storage, std::string_view name,
                                        std::string_view text, Publish mode) {
  auto partial = storage.begin("." + std::string(name) + ".partial-1");
  if (!partial) return failure(partial.error());
  if (Status written = write_file(**partial, "data", text); !written) {
    return failure(written.error());
  }
  return storage.publish(std::move(*partial), name, mode);
}

inline Result<std::string> read_text(Storage& storage, std::string_view name) {
  auto step = storage.open(name);
  if (!step) return failure(step.error());
  return read_file(**step, "data");
}

template <typename Factory>
class StorageConformance : public ::testing::Test {
 protected:
  std::shared_ptr<Storage> open() { return Factory::open(directory_ / "root"); }

  // What is there apart from the lock.
  Names names(Storage& storage) {
    const auto all = storage.list();
    EXPECT_TRUE(all) << all.error().text();
    Names result;
    for (const std::string& name : all.value_or(Names{})) {
      if (name != ".lock") result.push_back(name);
    }
    return result;
  }

  TemporaryDirectory directory_;
};

TYPED_TEST_SUITE_P(StorageConformance);

TYPED_TEST_P(StorageConformance, AStorageThatDoesNotExistYetIsEmpty) {
  const auto storage = this->open();
  EXPECT_EQ(this->names(*storage), Names{});
  EXPECT_EQ(storage->open("step-00000001").error().code, ErrorCode::kNotFound);
  EXPECT_TRUE(storage->remove("step-00000001"));
  EXPECT_TRUE(storage->remove_if_abandoned(".step-00000001.partial-1"));
}

TYPED_TEST_P(StorageConformance, WhatIsPublishedReadsBack) {
  const auto storage = this->open();
  auto partial = storage->begin(".step-00000001.partial-1");
  ASSERT_TRUE(partial) << partial.error().text();
  ASSERT_TRUE(write_file(**partial, "b", "second"));
  ASSERT_TRUE(write_file(**partial, "a", "first"));
  ASSERT_TRUE(write_file(**partial, "empty", ""));
  EXPECT_EQ((*partial)->list().value(), (Names{"a", "b", "empty"}));
  const auto published = storage->publish(std::move(*partial), "step-00000001", Publish::kNew);
  ASSERT_TRUE(published) << published.error().text();
  EXPECT_TRUE(published->durable);

  EXPECT_EQ(this->names(*storage), Names{"step-00000001"});
  const auto step = this->open()->open("step-00000001");
  ASSERT_TRUE(step) << step.error().text();
  EXPECT_EQ((*step)->list().value(), (Names{"a", "b", "empty"}));
  EXPECT_EQ(read_file(**step, "a").value(), "first");
  EXPECT_EQ(read_file(**step, "b").value(), "second");
  EXPECT_EQ(read_file(**step, "empty").value(), "");
}

TYPED_TEST_P(StorageConformance, WritesMayComeInAnyOrderAndLeaveHoles) {
  const auto storage = this->open();
  auto partial = storage->begin(".s.partial-1");
  ASSERT_TRUE(partial);
  auto file = (*partial)->create("data", 9);
  ASSERT_TRUE(file) << file.error().text();
  const auto expect_written = [](Status status) { EXPECT_TRUE(status); };
  (*file)->write_at(6, bytes_of("ghi"), expect_written);
  (*file)->write_at(0, bytes_of("abc"), expect_written);
  ASSERT_TRUE((*file)->sync());
  ASSERT_TRUE(storage->publish(std::move(*partial), "s", Publish::kNew));
  EXPECT_EQ(read_text(*storage, "s").value(), std::string("abc\0\0\0ghi", 9));
}

TYPED_TEST_P(StorageConformance, AFileIsCreatedOnce) {
  auto partial = this->open()->begin(".s.partial-1");
  ASSERT_TRUE(partial);
  ASSERT_TRUE((*partial)->create("data", 1));
  EXPECT_EQ((*partial)->create("data", 1).error().code, ErrorCode::kAlreadyExists);
}

TYPED_TEST_P(StorageConformance, WhatIsNotPublishedIsInvisibleAsAStepAndRemovedWithItsHandle) {
  const auto storage = this->open();
  {
    auto partial = storage->begin(".step-00000001.partial-1");
    ASSERT_TRUE(partial);
    ASSERT_TRUE(write_file(**partial, "data", "x"));
    EXPECT_EQ(this->names(*storage), Names{".step-00000001.partial-1"});
    EXPECT_EQ(storage->open("step-00000001").error().code, ErrorCode::kNotFound);
  }
  EXPECT_EQ(this->names(*storage), Names{});
}

TYPED_TEST_P(StorageConformance, PublishingANewStepUnderATakenNameChangesNothing) {
  const auto storage = this->open();
  ASSERT_TRUE(publish_text(*storage, "s", "old", Publish::kNew));
  const auto second = publish_text(*storage, "s", "new", Publish::kNew);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::kAlreadyExists);
  EXPECT_EQ(read_text(*storage, "s").value(), "old");
  EXPECT_EQ(this->names(*storage), Names{"s"});
}

TYPED_TEST_P(StorageConformance, ReplacingTakesTheOldStepsPlaceAndLeavesNothingElse) {
  const auto storage = this->open();
  ASSERT_TRUE(publish_text(*storage, "s", "old", Publish::kReplace));
  const auto second = publish_text(*storage, "s", "new", Publish::kReplace);
  ASSERT_TRUE(second) << second.error().text();
  EXPECT_TRUE(second->durable);
  EXPECT_EQ(read_text(*storage, "s").value(), "new");
  EXPECT_EQ(this->names(*storage), Names{"s"});
}

TYPED_TEST_P(StorageConformance, AnOpenStepReadsTheSameOrNothingWhileItIsReplaced) {
  const auto storage = this->open();
  ASSERT_TRUE(publish_text(*storage, "s", "old", Publish::kNew));
  const auto touched = storage->open("s");
  const auto untouched = storage->open("s");
  ASSERT_TRUE(touched);
  ASSERT_TRUE(untouched);
  EXPECT_EQ(read_file(**touched, "data").value(), "old");
  ASSERT_TRUE(publish_text(*storage, "s", "new", Publish::kReplace));
  EXPECT_EQ(read_file(**touched, "data").value(), "old");
  const auto late = read_file(**untouched, "data");
  if (late) {
    EXPECT_EQ(*late, "old");
  } else {
    EXPECT_EQ(late.error().code, ErrorCode::kNotFound);
  }
  EXPECT_EQ(read_text(*storage, "s").value(), "new");
}

TYPED_TEST_P(StorageConformance, AnOpenStepReadsTheSameOrNothingWhileItIsRemoved) {
  const auto storage = this->open();
  ASSERT_TRUE(publish_text(*storage, "s", "old", Publish::kNew));
  const auto touched = storage->open("s");
  const auto untouched = storage->open("s");
  ASSERT_TRUE(touched);
  ASSERT_TRUE(untouched);
  EXPECT_EQ(read_file(**touched, "data").value(), "old");
  ASSERT_TRUE(storage->remove("s"));
  EXPECT_EQ(read_file(**touched, "data").value(), "old");
  const auto late = read_file(**untouched, "data");
  if (late) {
    EXPECT_EQ(*late, "old");
  } else {
    EXPECT_EQ(late.error().code, ErrorCode::kNotFound);
  }
}

TYPED_TEST_P(StorageConformance, BeginningRemovesWhatADeadRunLeftThere) {
  const auto storage = this->open();
  auto dead = storage->begin(".s.partial-1");
  ASSERT_TRUE(dead);
  ASSERT_TRUE(write_file(**dead, "planted", "x"));
  auto partial = storage->begin(".s.partial-1");
  ASSERT_TRUE(partial) << partial.error().text();
  EXPECT_EQ((*partial)->list().value(), Names{});
}

TYPED_TEST_P(StorageConformance, ADirectoryWhoseNameWasTakenOverRemovesOnlyItself) {
  const auto storage = this->open();
  auto first = storage->begin(".s.partial-1");
  auto second = storage->begin(".s.partial-1");
  ASSERT_TRUE(first);
  ASSERT_TRUE(second);
  first->reset();
  EXPECT_EQ(this->names(*storage), Names{".s.partial-1"});
  ASSERT_TRUE(write_file(**second, "data", "x"));
  EXPECT_TRUE(storage->publish(std::move(*second), "s", Publish::kNew));
}

TYPED_TEST_P(StorageConformance, ADirectoryWhoseNameWasTakenOverDoesNotPublishTheOthersFiles) {
  const auto storage = this->open();
  auto first = storage->begin(".s.partial-1");
  auto second = storage->begin(".s.partial-1");
  ASSERT_TRUE(first);
  ASSERT_TRUE(second);
  EXPECT_FALSE(storage->publish(std::move(*first), "s", Publish::kReplace));
  EXPECT_EQ(this->names(*storage), Names{".s.partial-1"});
}

TYPED_TEST_P(StorageConformance, ADirectoryThatWasTakenAwayIsNotPublished) {
  const auto storage = this->open();
  auto partial = storage->begin(".s.partial-1");
  ASSERT_TRUE(partial);
  ASSERT_TRUE(storage->remove(".s.partial-1"));
  EXPECT_FALSE(storage->publish(std::move(*partial), "s", Publish::kReplace));
  EXPECT_EQ(this->names(*storage), Names{});
}

TYPED_TEST_P(StorageConformance, OnlyAbandonedDirectoriesAreSwept) {
  const auto storage = this->open();
  const auto other = this->open();
  auto alive = storage->begin(".s.partial-1");
  ASSERT_TRUE(alive);
  ASSERT_TRUE(write_file(**alive, "data", "x"));
  EXPECT_TRUE(other->remove_if_abandoned(".s.partial-1"));
  EXPECT_EQ(this->names(*storage), Names{".s.partial-1"});
  EXPECT_TRUE(storage->publish(std::move(*alive), "s", Publish::kNew));
  EXPECT_TRUE(other->remove_if_abandoned(".s.partial-1"));
  EXPECT_EQ(read_text(*storage, "s").value(), "x");
}

TYPED_TEST_P(StorageConformance, RemovingMakesAStepGoAndMissingIsSuccess) {
  const auto storage = this->open();
  ASSERT_TRUE(publish_text(*storage, "s", "old", Publish::kNew));
  ASSERT_TRUE(publish_text(*storage, "t", "kept", Publish::kNew));
  EXPECT_TRUE(storage->remove("s"));
  EXPECT_EQ(this->names(*storage), Names{"t"});
  EXPECT_EQ(storage->open("s").error().code, ErrorCode::kNotFound);
  EXPECT_TRUE(storage->remove("s"));
  EXPECT_EQ(read_text(*storage, "t").value(), "kept");
}

TYPED_TEST_P(StorageConformance, ReadingBeyondTheEndOfAFileIsDamage) {
  const auto storage = this->open();
  ASSERT_TRUE(publish_text(*storage, "s", "12345", Publish::kNew));
  const auto step = storage->open("s");
  ASSERT_TRUE(step);
  std::vector<std::byte> bytes(6);
  EXPECT_EQ((*step)->read_at("data", 0, bytes).error().code, ErrorCode::kCorrupt);
  EXPECT_EQ((*step)->read_at("data", 100, bytes).error().code, ErrorCode::kCorrupt);
  EXPECT_TRUE((*step)->read_at("data", 5, {}));
}

TYPED_TEST_P(StorageConformance, AMissingFileIsNotFound) {
  const auto storage = this->open();
  ASSERT_TRUE(publish_text(*storage, "s", "x", Publish::kNew));
  const auto step = storage->open("s");
  ASSERT_TRUE(step);
  std::vector<std::byte> bytes(1);
  EXPECT_EQ((*step)->file_bytes("absent").error().code, ErrorCode::kNotFound);
  EXPECT_EQ((*step)->read_at("absent", 0, bytes).error().code, ErrorCode::kNotFound);
}

TYPED_TEST_P(StorageConformance, NamesThatLeaveTheirDirectoryAreRefusedEverywhere) {
  const auto storage = this->open();
  ASSERT_TRUE(publish_text(*storage, "s", "x", Publish::kNew));
  const auto step = storage->open("s");
  ASSERT_TRUE(step);
  auto partial = storage->begin(".s.partial-1");
  ASSERT_TRUE(partial);
  for (const std::string_view name :
       {std::string_view(""), std::string_view("."), std::string_view(".."),
        std::string_view("../s"), std::string_view("a/b"), std::string_view("/etc"),
        std::string_view("a\0b", 3)}) {
    EXPECT_EQ(storage->begin(name).error().code, ErrorCode::kInvalidArgument) << name;
    EXPECT_EQ(storage->open(name).error().code, ErrorCode::kInvalidArgument) << name;
    EXPECT_EQ(storage->remove(name).error().code, ErrorCode::kInvalidArgument) << name;
    EXPECT_EQ(storage->remove_if_abandoned(name).error().code, ErrorCode::kInvalidArgument);
    EXPECT_EQ((*partial)->create(name, 1).error().code, ErrorCode::kInvalidArgument) << name;
    EXPECT_EQ((*step)->file_bytes(name).error().code, ErrorCode::kInvalidArgument) << name;
  }
  EXPECT_EQ(storage->publish(std::move(*partial), "../t", Publish::kNew).error().code,
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(this->names(*storage), Names{"s"});
}

TYPED_TEST_P(StorageConformance, TheSecondWriterIsRefusedAndToldWhoIsFirst) {
  const auto storage = this->open();
  auto first = storage->lock("train.py:12");
  ASSERT_TRUE(first) << first.error().text();
  const auto second = this->open()->lock("other.py:1");
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::kUnavailable);
  EXPECT_NE(second.error().message.find("train.py:12"), std::string::npos) << second.error().text();
  EXPECT_NE(second.error().message.find(storage->path()), std::string::npos);
  first->reset();
  EXPECT_TRUE(storage->lock("other.py:1"));
}

REGISTER_TYPED_TEST_SUITE_P(
    StorageConformance, AStorageThatDoesNotExistYetIsEmpty, WhatIsPublishedReadsBack,
    WritesMayComeInAnyOrderAndLeaveHoles, AFileIsCreatedOnce,
    WhatIsNotPublishedIsInvisibleAsAStepAndRemovedWithItsHandle,
    PublishingANewStepUnderATakenNameChangesNothing,
    ReplacingTakesTheOldStepsPlaceAndLeavesNothingElse,
    AnOpenStepReadsTheSameOrNothingWhileItIsReplaced,
    AnOpenStepReadsTheSameOrNothingWhileItIsRemoved, BeginningRemovesWhatADeadRunLeftThere,
    ADirectoryWhoseNameWasTakenOverRemovesOnlyItself,
    ADirectoryWhoseNameWasTakenOverDoesNotPublishTheOthersFiles,
    ADirectoryThatWasTakenAwayIsNotPublished, OnlyAbandonedDirectoriesAreSwept,
    RemovingMakesAStepGoAndMissingIsSuccess, ReadingBeyondTheEndOfAFileIsDamage,
    AMissingFileIsNotFound, NamesThatLeaveTheirDirectoryAreRefusedEverywhere,
    TheSecondWriterIsRefusedAndToldWhoIsFirst);

}  // namespace strandline::testing
