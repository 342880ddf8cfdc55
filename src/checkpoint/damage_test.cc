// Damage of any byte of any file is found, and nothing damaged is ever loaded.

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <set>

#include "format/digest.h"
#include "format/manifest.h"
#include "strandline/checkpointer.h"
#include "testing/checkpoint_fixture.h"

namespace strandline {
namespace {

using testing::content_of;
using ::testing::HasSubstr;
using testing::Job;
using testing::kPatience;
using testing::must;
using testing::must_fail;
using testing::read_text;
using testing::TemporaryDirectory;
using testing::write_text;

// One checkpoint with an alias, several groups, an index for each and an extra file.
class Damaged : public ::testing::Test {
 protected:
  Damaged() {
    Checkpointer checkpointer = must(Checkpointer::open(directory_.path()));
    SaveOptions options;
    options.extra_files = {{"config.json", "{\"hidden\": 64}"}};
    options.metrics = {{"loss", 0.5}};
    must(testing::save_durably(checkpointer, 1, job_, options));
    must(checkpointer.close());
    content_ = content_of(job_);
  }

  // Neither verify() nor load() lets it pass, and restore() changes nothing with `verify_first`.
  void expect_found(const std::string& what) {
    const Result<Checkpoint> checkpoint = Checkpoint::open(step_);
    if (checkpoint) {
      EXPECT_FALSE(must(checkpoint->verify()).empty()) << what;
    } else {
      expect_damage_code(checkpoint.error(), what);
    }
    const Result<Loaded> loaded = load(step_);
    ASSERT_FALSE(loaded) << what;
    expect_damage_code(loaded.error(), what);
  }

  void expect_damage_code(const Error& error, const std::string& what) {
    EXPECT_TRUE(error.code == ErrorCode::kCorrupt || error.code == ErrorCode::kUnsupported ||
                error.code == ErrorCode::kNotFound)
        << what << ": " << error.text();
    EXPECT_THAT(error.text(), HasSubstr(step_.string())) << what;
  }

  void expect_intact() {
    EXPECT_TRUE(must(must(Checkpoint::open(step_)).verify()).empty());
    EXPECT_EQ(content_of(must(load(step_)).state), content_);
  }

  const TemporaryDirectory directory_;
  const std::filesystem::path step_ = directory_ / "step-00000001";
  Job job_{1};
  std::vector<std::string> content_;
};

TEST_F(Damaged, EveryFlippedByteOfEveryFileIsFoundAndNeverLoaded) {
  const std::vector<std::string> names = testing::names_in(step_);
  const std::set<std::string> kinds(names.begin(), names.end());
  for (const char* name : {"manifest.json", "rank-00000.json", "config.json",
                           "model-00001-of-00001.safetensors", "model.safetensors.index.json"}) {
    EXPECT_TRUE(kinds.contains(name)) << name;
  }
  for (const std::string& name : names) {
    const std::string text = read_text(step_ / name);
    const int fd = ::open((step_ / name).c_str(), O_WRONLY | O_CLOEXEC);
    ASSERT_GE(fd, 0);
    for (std::size_t i = 0; i < text.size() && !HasFailure(); ++i) {
      const char flipped = static_cast<char>(text[i] ^ (1 << (i % 8)));
      ASSERT_EQ(::pwrite(fd, &flipped, 1, static_cast<off_t>(i)), 1);
      expect_found(name + " byte " + std::to_string(i));
      ASSERT_EQ(::pwrite(fd, &text[i], 1, static_cast<off_t>(i)), 1);
    }
    ::close(fd);
  }
  expect_intact();
}

TEST_F(Damaged, EveryTruncatedExtendedEmptiedMissingOrReplacedFileIsFound) {
  for (const std::string& name : testing::names_in(step_)) {
    const std::string text = read_text(step_ / name);
    for (const std::size_t bytes :
         {text.size() - 1, text.size() / 2, std::size_t{7}, std::size_t{1}, std::size_t{0}}) {
      write_text(step_ / name, text.substr(0, bytes));
      expect_found(name + " cut to " + std::to_string(bytes));
    }
    for (const char* more : {"\n", " ", "\0garbage"}) {
      write_text(step_ / name, text + (*more == '\0' ? std::string(1, '\0') : more));
      expect_found(name + " with more bytes");
    }
    std::filesystem::remove(step_ / name);
    if (name != "manifest.json") expect_found(name + " missing");
    std::filesystem::create_directory(step_ / name);
    if (name != "manifest.json") expect_found(name + " a directory");
    std::filesystem::remove(step_ / name);
    write_text(step_ / name, text);
  }
  expect_intact();
}

TEST_F(Damaged, WithoutItsManifestAStepIsNoCheckpoint) {
  std::filesystem::remove(step_ / "manifest.json");
  EXPECT_FALSE(Checkpoint::open(step_));
  EXPECT_EQ(must_fail(load(step_)).code, ErrorCode::kNotFound);
  const Error error = must_fail(load(directory_.path()));
  EXPECT_EQ(error.code, ErrorCode::kCorrupt);
  EXPECT_THAT(error.message, HasSubstr("step-00000001"));
}

TEST_F(Damaged, WhatTheManifestDoesNotListIsReportedByVerify) {
  write_text(step_ / "model.safetensors", "planted");
  write_text(step_ / ".hidden", "planted");
  std::filesystem::create_directory(step_ / "folder");
  const std::vector<Damage> damages = must(must(Checkpoint::open(step_)).verify());
  ASSERT_EQ(damages.size(), 3u);
  std::set<std::string> files;
  for (const Damage& damage : damages) {
    files.insert(damage.file);
    EXPECT_THAT(damage.message, HasSubstr("not in the manifest"));
  }
  EXPECT_EQ(files, (std::set<std::string>{".hidden", "folder", "model.safetensors"}));
  for (const std::string& file : files) std::filesystem::remove(step_ / file);
  expect_intact();
}

TEST_F(Damaged, LinksInAStepAreNotFollowed) {
  for (const std::string& name : testing::names_in(step_)) {
    std::filesystem::rename(step_ / name, directory_ / "elsewhere");
    std::filesystem::create_symlink(directory_ / "elsewhere", step_ / name);
    EXPECT_FALSE(Checkpoint::open(step_)) << name;
    EXPECT_FALSE(load(step_)) << name;
    std::filesystem::remove(step_ / name);
    std::filesystem::rename(directory_ / "elsewhere", step_ / name);
  }
  expect_intact();
}

TEST_F(Damaged, FilesOfAnotherSaveAreNotTaken) {
  // Same names and sizes, another run.
  const TemporaryDirectory other;
  testing::commit_steps(other.path(), {1});
  for (const std::string& name : testing::names_in(other / "step-00000001")) {
    const std::string text = read_text(step_ / name);
    const std::string theirs = read_text(other / "step-00000001" / name);
    if (theirs == text || name == "manifest.json") continue;
    write_text(step_ / name, theirs);
    expect_found(name + " of another run");
    write_text(step_ / name, text);
  }
  // Another step's directory under this one's name.
  std::filesystem::rename(step_, directory_ / "step-00000002");
  const Error error = must_fail(load(directory_.path()));
  EXPECT_EQ(error.code, ErrorCode::kCorrupt);
  EXPECT_THAT(error.message, HasSubstr("renamed"));
}

TEST_F(Damaged, DamageIsReportedByTensorAndFile) {
  const std::string name = "optimizer-00001-of-00001.safetensors";
  std::string text = read_text(step_ / name);
  text.back() = static_cast<char>(text.back() ^ 1);
  write_text(step_ / name, text);
  const std::vector<Damage> damages = must(must(Checkpoint::open(step_)).verify());
  ASSERT_EQ(damages.size(), 1u);
  EXPECT_EQ(damages.front().file, name);
  EXPECT_EQ(damages.front().key_path, "optimizer.moments");
  const Error error = must_fail(load(step_));
  EXPECT_EQ(error.code, ErrorCode::kCorrupt);
  EXPECT_EQ(error.key_path, "optimizer.moments");
  EXPECT_THAT(error.path, HasSubstr(name));
  // What is not asked for is not read.
  LoadOptions options;
  options.keys = {"model"};
  EXPECT_TRUE(load(step_, options));
}

TEST_F(Damaged, WhatIsDamagedAfterOpeningIsFoundByVerify) {
  const Checkpoint checkpoint = must(Checkpoint::open(step_));
  EXPECT_TRUE(must(checkpoint.verify()).empty());
  std::string text = read_text(step_ / "rank-00000.json");
  text[10] ^= 1;
  write_text(step_ / "rank-00000.json", text);
  const std::vector<Damage> damages = must(checkpoint.verify());
  ASSERT_FALSE(damages.empty());
  EXPECT_EQ(damages.front().file, "rank-00000.json");
  EXPECT_EQ(must_fail(checkpoint.verify([](std::uint64_t, std::uint64_t) { return false; })).code,
            ErrorCode::kUnavailable);
}

// Manifests that were written with evil intent, digest and all.
class HostileManifest : public Damaged {
 protected:
  // Replaces the first `from` in the manifest by `to` and signs it anew.
  void rewrite(const std::string& from, const std::string& to) {
    std::string text = read_text(step_ / "manifest.json");
    const std::size_t tail = text.rfind(",\"manifest_digest\":");
    ASSERT_NE(tail, std::string::npos);
    text.resize(tail);
    const std::size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    const std::string digest = format::digest_of(text).hex();
    write_text(step_ / "manifest.json", text + ",\"manifest_digest\":\"" + digest + "\"}\n");
  }
};

TEST_F(HostileManifest, AReSignedManifestIsReadable) {
  rewrite("\"step\":1,", "\"step\":1,");
  expect_intact();
}

TEST_F(HostileManifest, NamesThatLeadOutOfTheStepAreReportedNotFollowed) {
  write_text(directory_ / "evil.json", read_text(step_ / "config.json"));
  for (const char* name : {"../evil.json", "/etc/passwd", ".", "..", "a/../config.json"}) {
    const std::string before = read_text(step_ / "manifest.json");
    rewrite("\"name\":\"config.json\"", "\"name\":\"" + std::string(name) + "\"");
    expect_found(name);
    write_text(step_ / "manifest.json", before);
  }
}

TEST_F(HostileManifest, ANewerFormatIsUnsupportedWithARemedyEvenWhereOlderStepsExist) {
  testing::commit_steps(directory_.path(), {0});
  rewrite("\"major\":1", "\"major\":2");
  const Error error = must_fail(load(directory_.path()));
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  EXPECT_THAT(error.message, HasSubstr("newer"));
  Checkpointer checkpointer = must(Checkpointer::open(directory_.path()));
  Job job(5);
  StateDict state = job.state();
  const auto before = content_of(state);
  EXPECT_EQ(must_fail(checkpointer.restore(state)).code, ErrorCode::kUnsupported);
  EXPECT_EQ(content_of(state), before);
  // It is not overwritten by chance either: its place in the sequence is unknown.
  EXPECT_EQ(must_fail(checkpointer.save(1, job.state())).code, ErrorCode::kUnsupported);
  EXPECT_EQ(must_fail(checkpointer.save(2, job.state())).code, ErrorCode::kUnsupported);
}

TEST_F(HostileManifest, AnUnknownRequirementIsUnsupported) {
  rewrite("\"requires\":[]", "\"requires\":[\"time travel\"]");
  const Error error = must_fail(load(step_));
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  EXPECT_THAT(error.message, HasSubstr("time travel"));
}

TEST_F(HostileManifest, SizesShapesAndAliasesThatDoNotFitAreFound) {
  const std::pair<const char*, const char*> changes[] = {
      {"\"shape\":[6,8]", "\"shape\":[6,9]"},
      {"\"shape\":[6,8]", "\"shape\":[18446744073709551615,18446744073709551615]"},
      {"\"offset_bytes\":0", "\"offset_bytes\":4"},
      {"\"offset_bytes\":0", "\"offset_bytes\":18446744073709551615"},
      {"\"offset_bytes\":0", "\"offset_bytes\":-1"},
      {"\"dtype\":\"F32\"", "\"dtype\":\"F64\""},
      {"\"dtype\":\"F32\"", "\"dtype\":\"I32\""},
      {"\"sequence\":1", "\"sequence\":0"},
      {"\"step\":1,", "\"step\":-1,"},
      {"\"world\":1", "\"world\":1,\"world\":1"},
  };
  const std::string before = read_text(step_ / "manifest.json");
  for (const auto& [from, to] : changes) {
    rewrite(from, to);
    expect_found(to);
    write_text(step_ / "manifest.json", before);
  }
}

}  // namespace
}  // namespace strandline
