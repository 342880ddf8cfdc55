// The command-line tool, run as users run it, on checkpoints that the library wrote.

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <simdjson.h>
#include <stdlib.h>
#include <sys/inotify.h>
#include <termios.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <sstream>
#include <thread>

#include "format/digest.h"
#include "process.h"
#include "strandline/checkpointer.h"
#include "strandline/version.h"
#include "testing/temporary_directory.h"

namespace strandline::testing {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::StartsWith;

constexpr int kFine = 0;
constexpr int kDamaged = 1;
constexpr int kUsage = 2;
constexpr int kUnreadable = 3;
constexpr int kInterrupted = 130;

ProcessResult strandline_tool(std::vector<std::string> arguments,
                              const ProcessOptions& options = {}) {
  arguments.insert(arguments.begin(), STRANDLINE_BINARY_DIR "/strandline");
  return run_process(arguments, options);
}

std::string content_of(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

void write_content(const fs::path& file, const std::string& content) {
  std::ofstream(file, std::ios::binary | std::ios::trunc) << content;
}

void flip_last_byte(const fs::path& file) {
  std::string content = content_of(file);
  content.back() = static_cast<char>(content.back() ^ 1);
  write_content(file, content);
}

// A manifest with `from` replaced by `to`, sealed again: damage that only its reader can judge.
void rewrite_manifest(const fs::path& step, const std::string& from, const std::string& to) {
  std::string text = content_of(step / "manifest.json");
  const std::string seal = ",\"manifest_digest\":\"";
  text.resize(text.rfind(seal));
  const std::size_t at = text.find(from);
  ASSERT_NE(at, std::string::npos) << from;
  text.replace(at, from.size(), to);
  const std::string digest = format::digest_of(std::string_view(text)).hex();
  write_content(step / "manifest.json", text + seal + digest + "\"}\n");
}

// A terminal without a window: what is written into it can be read.
class Terminal {
 public:
  Terminal() : outside_(posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC)) {
    if (grantpt(outside_) == 0 && unlockpt(outside_) == 0) {
      inside_ = open(ptsname(outside_), O_RDWR | O_NOCTTY | O_CLOEXEC);
    }
    EXPECT_GE(inside_, 0);
  }
  ~Terminal() {
    close(inside_);
    close(outside_);
  }
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;

  [[nodiscard]] int inside() const { return inside_; }

  // What was written into it. REQUIRES: something was.
  [[nodiscard]] std::string shown() const {
    std::array<char, 4096> buffer{};
    const ssize_t count = read(outside_, buffer.data(), buffer.size());
    return {buffer.data(), count > 0 ? static_cast<std::size_t>(count) : 0};
  }

 private:
  int outside_ = -1;
  int inside_ = -1;
};

class Cli : public ::testing::Test {
 protected:
  Cli() { std::iota(weights_.begin(), weights_.end(), 0.0f); }

  StateDict state() {
    const auto weights = TensorView::of(weights_, {3, 4});
    return {{"model", StateDict{{"weight", weights}, {"tied", weights}}},
            {"optimizer", StateDict{{"momentum", TensorView::of(momentum_)},
                                    {"name", "adam"},
                                    {"extra", StateDict{}}}},
            {"epoch", 3}};
  }

  void save(std::int64_t step, const StateDict& state, const SaveOptions& options = {}) {
    auto checkpointer = Checkpointer::open(directory_.path());
    ASSERT_TRUE(checkpointer) << checkpointer.error().text();
    const auto save = checkpointer->save(step, state, options);
    ASSERT_TRUE(save) << save.error().text();
    const Status closed = checkpointer->close();
    ASSERT_TRUE(closed) << closed.error().text();
  }

  void save(std::int64_t step) {
    save(step, state(), {.metrics = {{"loss", 0.5}}, .metadata = {{"note", "first light"}}});
  }

  [[nodiscard]] std::string path() const { return directory_.path().string(); }
  [[nodiscard]] fs::path step_path(std::int64_t step) const {
    std::string digits = std::to_string(step);
    digits.insert(0, 8 - digits.size(), '0');
    return directory_ / ("step-" + digits);
  }
  [[nodiscard]] fs::path shard(std::int64_t step) const {
    return step_path(step) / "model-00001-of-00001.safetensors";
  }

  // REQUIRES: JSON; the element lives until the next call.
  simdjson::dom::element json(const std::string& text) {
    const auto parsed = parser_.parse(text);
    EXPECT_EQ(parsed.error(), simdjson::SUCCESS) << text;
    return parsed.error() == simdjson::SUCCESS ? parsed.value_unsafe() : simdjson::dom::element();
  }

  TemporaryDirectory directory_;
  std::array<float, 12> weights_{};
  std::array<float, 5> momentum_{};
  simdjson::dom::parser parser_;
};

std::string_view text_at(simdjson::dom::element element, std::string_view pointer) {
  return element.at_pointer(pointer).get_string().value();
}
std::int64_t number_at(simdjson::dom::element element, std::string_view pointer) {
  return element.at_pointer(pointer).get_int64().value();
}
std::size_t count_at(simdjson::dom::element element, std::string_view pointer) {
  return element.at_pointer(pointer).get_array().value().size();
}

// ---- Usage ----

TEST_F(Cli, HelpShowsEveryVerbWithExamplesAndExitCodes) {
  const auto main = strandline_tool({"--help"});
  EXPECT_EQ(main.exit_code, kFine);
  EXPECT_THAT(main.out, AllOf(HasSubstr("ls "), HasSubstr("inspect "), HasSubstr("verify "),
                              HasSubstr("Examples:"), HasSubstr("Exit codes:")));
  for (const std::string verb : {"ls", "inspect", "verify"}) {
    const auto help = strandline_tool({verb, "--help"});
    EXPECT_EQ(help.exit_code, kFine);
    EXPECT_THAT(help.out, AllOf(HasSubstr("PATH"), HasSubstr("--json"), HasSubstr("Examples:"),
                                HasSubstr("strandline " + verb + " "), HasSubstr("Exit codes:")));
  }
}

TEST_F(Cli, TheDocumentedHelpIsTheHelp) {
  const std::string document = content_of(STRANDLINE_SOURCE_DIR "/docs/command_line.md");
  EXPECT_THAT(document, HasSubstr("$ strandline --help\n" + strandline_tool({"--help"}).out));
}

TEST_F(Cli, HelpLinesFitATerminal) {
  for (const std::string verb : {"ls", "inspect", "verify"}) {
    std::istringstream help(strandline_tool({verb, "--help"}).out);
    for (std::string line; std::getline(help, line);) EXPECT_LE(line.size(), 100u) << line;
  }
}

TEST_F(Cli, VersionIsThatOfTheLibrary) {
  const auto version = strandline_tool({"--version"});
  EXPECT_EQ(version.exit_code, kFine);
  EXPECT_THAT(version.out, StartsWith(std::string("strandline ") + kVersion + " (format 1."));
}

TEST_F(Cli, WrongUsageExitsWithTwoAndSaysWhatIsWrong) {
  save(100);
  const std::string step = step_path(100).string();
  const std::vector<std::vector<std::string>> wrong = {
      {},
      {"no-such-verb"},
      {"ls"},
      {"ls", path(), "--no-such-option"},
      {"verify", path(), "--step", "many"},
      {"verify", path(), "--step", "-1"},
      {"verify", path(), "--step", "100", "--all"},
      {"verify", step, "--all"},
      {"verify", step, "--step", "100"},
      {"inspect", step, "--step", "100"},
  };
  for (const auto& arguments : wrong) {
    const auto result = strandline_tool(arguments);
    EXPECT_EQ(result.exit_code, kUsage) << ::testing::PrintToString(arguments);
    EXPECT_THAT(result.err, Not(IsEmpty())) << ::testing::PrintToString(arguments);
    EXPECT_THAT(result.out, IsEmpty()) << ::testing::PrintToString(arguments);
  }
}

TEST_F(Cli, WhatDoesNotExistExitsWithThreeAndIsNamed) {
  const std::string missing = path() + "/missing";
  const std::string plain_file = path() + "/plain";
  write_content(plain_file, "not a directory");
  for (const std::string verb : {"ls", "inspect", "verify"}) {
    for (const std::string& place : {missing, plain_file}) {
      const auto result = strandline_tool({verb, place});
      EXPECT_EQ(result.exit_code, kUnreadable) << verb << ' ' << place;
      EXPECT_THAT(result.err, HasSubstr(place)) << verb;
      EXPECT_THAT(result.out, IsEmpty()) << verb;
    }
  }
}

TEST_F(Cli, ADirectoryWithoutCheckpointsIsNothingToListAndNothingToRead) {
  const auto listed = strandline_tool({"ls", path()});
  EXPECT_EQ(listed.exit_code, kFine);
  EXPECT_THAT(listed.out, IsEmpty());
  EXPECT_THAT(listed.err, HasSubstr("no committed checkpoint"));
  const auto as_json = strandline_tool({"ls", path(), "--json"});
  EXPECT_EQ(as_json.exit_code, kFine);
  EXPECT_EQ(count_at(json(as_json.out), "/checkpoints"), 0u);
  for (const std::string verb : {"inspect", "verify"}) {
    const auto result = strandline_tool({verb, path()});
    EXPECT_EQ(result.exit_code, kUnreadable) << verb;
    EXPECT_THAT(result.err, HasSubstr("no checkpoint in '" + path() + "'")) << verb;
  }
}

TEST_F(Cli, AStepThatDoesNotExistIsAnsweredWithThoseThatDo) {
  save(100);
  save(200);
  for (const std::string verb : {"inspect", "verify"}) {
    const auto result = strandline_tool({verb, path(), "--step", "150"});
    EXPECT_EQ(result.exit_code, kUnreadable) << verb;
    EXPECT_THAT(result.err, AllOf(HasSubstr("no step 150"), HasSubstr("100, 200"))) << verb;
  }
}

// ---- ls ----

TEST_F(Cli, LsListsCommittedStepsNewestLast) {
  save(200);
  save(100);
  fs::create_directory(directory_ / ".step-00000300.partial-0123");
  const auto result = strandline_tool({"ls", path()});
  EXPECT_EQ(result.exit_code, kFine);
  EXPECT_THAT(result.err, IsEmpty());
  EXPECT_THAT(result.out, AllOf(StartsWith("STEP  SEQUENCE"), HasSubstr("loss=0.5")));
  EXPECT_LT(result.out.find("\n 200 "), result.out.find("\n 100 "));
  EXPECT_EQ(std::count(result.out.begin(), result.out.end(), '\n'), 3);
}

TEST_F(Cli, LsAsJsonHoldsWhatTheManifestsSay) {
  save(100);
  const auto result = strandline_tool({"ls", path(), "--json"});
  EXPECT_EQ(result.exit_code, kFine);
  const auto document = json(result.out);
  EXPECT_EQ(text_at(document, "/directory"), path());
  EXPECT_EQ(count_at(document, "/checkpoints"), 1u);
  EXPECT_EQ(text_at(document, "/checkpoints/0/name"), "step-00000100");
  EXPECT_EQ(number_at(document, "/checkpoints/0/step"), 100);
  EXPECT_TRUE(document.at_pointer("/checkpoints/0/parent").is_null());
  EXPECT_TRUE(document.at_pointer("/checkpoints/0/error").is_null());
  EXPECT_EQ(document.at_pointer("/checkpoints/0/metrics/loss").get_double().value(), 0.5);
  std::uintmax_t bytes = 0;
  for (const auto& file : fs::directory_iterator(step_path(100))) bytes += file.file_size();
  EXPECT_EQ(number_at(document, "/checkpoints/0/bytes"), static_cast<std::int64_t>(bytes));
}

TEST_F(Cli, LsMarksAnUnreadableStepWithItsReason) {
  save(100);
  save(200);
  flip_last_byte(step_path(200) / "manifest.json");
  const auto result = strandline_tool({"ls", path()});
  EXPECT_EQ(result.exit_code, kDamaged);
  EXPECT_THAT(result.out, AllOf(HasSubstr("200"), HasSubstr("UNREADABLE: "), HasSubstr("100")));
  const auto as_json = strandline_tool({"ls", path(), "--json"});
  EXPECT_EQ(as_json.exit_code, kDamaged);
  const auto document = json(as_json.out);
  EXPECT_EQ(count_at(document, "/checkpoints"), 2u);
  EXPECT_EQ(number_at(document, "/checkpoints/0/step"), 200);
  EXPECT_THAT(std::string(text_at(document, "/checkpoints/0/error")), HasSubstr("manifest"));
}

TEST_F(Cli, LsOfOneCheckpointListsIt) {
  save(100);
  const auto result = strandline_tool({"ls", step_path(100).string()});
  EXPECT_EQ(result.exit_code, kFine);
  EXPECT_THAT(result.out, HasSubstr("\n 100 "));
}

// ---- inspect ----

TEST_F(Cli, InspectShowsManifestFilesTensorsAndValues) {
  save(100);
  const auto result = strandline_tool({"inspect", step_path(100).string()});
  EXPECT_EQ(result.exit_code, kFine);
  EXPECT_THAT(result.err, IsEmpty());
  EXPECT_THAT(result.out, ::testing::ContainsRegex("step +100\n"));
  EXPECT_THAT(result.out, ::testing::ContainsRegex("metric +loss = 0.5\n"));
  EXPECT_THAT(result.out, ::testing::ContainsRegex("metadata +note = 'first light'\n"));
  EXPECT_THAT(result.out,
              ::testing::ContainsRegex(
                  "\nmodel.weight +F32 +.3, 4. +48 B +model-00001-of-00001.safetensors"));
  EXPECT_THAT(result.out,
              ::testing::ContainsRegex("\nmodel.tied +F32 +.3, 4. +48 B +alias of model.weight\n"));
  EXPECT_THAT(result.out, ::testing::ContainsRegex("\noptimizer.name +str +'adam'\n"));
  EXPECT_THAT(result.out, ::testing::ContainsRegex("\noptimizer.extra +dict +.empty.\n"));
  EXPECT_THAT(result.out, ::testing::ContainsRegex("\nepoch +int +3\n"));
  EXPECT_THAT(result.out, HasSubstr("\n3 tensors (68 B stored), 2 values\n"));
}

TEST_F(Cli, InspectAsJsonHoldsTheSame) {
  save(100);
  const auto result = strandline_tool({"inspect", path(), "--json"});
  EXPECT_EQ(result.exit_code, kFine);
  const auto document = json(result.out);
  EXPECT_EQ(number_at(document, "/step"), 100);
  EXPECT_EQ(number_at(document, "/format/major"), 1);
  EXPECT_EQ(text_at(document, "/metadata/0/value"), "first light");
  EXPECT_EQ(text_at(document, "/tensors/0/key"), "model.weight");
  EXPECT_EQ(text_at(document, "/tensors/0/path/1"), "weight");
  EXPECT_EQ(text_at(document, "/tensors/0/dtype"), "F32");
  EXPECT_EQ(number_at(document, "/tensors/0/shape/1"), 4);
  EXPECT_EQ(text_at(document, "/tensors/1/alias_of"), "model.weight");
  EXPECT_EQ(number_at(document, "/tensors/1/bytes"), 48);
  EXPECT_EQ(text_at(document, "/values/0/value"), "adam");
  EXPECT_EQ(text_at(document, "/values/1/key"), "epoch");
  EXPECT_EQ(number_at(document, "/values/1/value"), 3);
}

TEST_F(Cli, InspectCanBeNarrowedToOneSubtree) {
  save(100);
  const auto result = strandline_tool({"inspect", path(), "--keys", "optimizer"});
  EXPECT_EQ(result.exit_code, kFine);
  EXPECT_THAT(result.out, AllOf(HasSubstr("optimizer.momentum"), Not(HasSubstr("model.weight"))));
  const auto missing = strandline_tool({"inspect", path(), "--keys", "optimiser"});
  EXPECT_EQ(missing.exit_code, kUnreadable);
  EXPECT_THAT(missing.err, HasSubstr("no key 'optimiser'"));
}

TEST_F(Cli, InspectOfADirectoryTakesTheNewestGoodStepAndNamesWhatItSkipped) {
  save(200);
  save(100);
  EXPECT_EQ(number_at(json(strandline_tool({"inspect", path(), "--json"}).out), "/step"), 100);
  const auto older = strandline_tool({"inspect", path(), "--step", "200", "--json"});
  EXPECT_EQ(number_at(json(older.out), "/step"), 200);
  fs::resize_file(shard(100), 100);
  const auto result = strandline_tool({"inspect", path(), "--json"});
  EXPECT_EQ(result.exit_code, kDamaged);
  EXPECT_EQ(number_at(json(result.out), "/step"), 200);
  EXPECT_THAT(result.err, HasSubstr("skipped step 100"));
}

TEST_F(Cli, InspectOfADirectoryComplainsAboutANewerStepWithoutAReadableManifest) {
  save(100);
  save(200);
  save(300);
  write_content(step_path(100) / "manifest.json", "{}");
  write_content(step_path(300) / "manifest.json", "{}");
  const auto result = strandline_tool({"inspect", path(), "--json"});
  EXPECT_EQ(result.exit_code, kDamaged);
  EXPECT_EQ(number_at(json(result.out), "/step"), 200);
  EXPECT_THAT(result.err, HasSubstr("skipped step 300"));
  EXPECT_THAT(result.err, Not(HasSubstr("step 100")));  // Older than the one shown.
}

// Numbers that JSON cannot hold, and what only an adapter understands, are still told apart.
TEST_F(Cli, InspectKeepsUncommonValuesApartInJson) {
  save(1, {{"none", Value::None{}},
           {"nan", std::nan("")},
           {"big", Value::BigInteger{"-170141183460469231731687303715884105729"}},
           {"bytes", Value::Bytes{std::string("\x00\xff", 2)}},
           {"list", Value::List{Value(true), Value(1.5)}},
           {"tagged", Value::Tagged{"torch.dtype", {Value("float32")}}}});
  const auto result = strandline_tool({"inspect", path(), "--json"});
  EXPECT_EQ(result.exit_code, kFine);
  const auto document = json(result.out);
  EXPECT_TRUE(document.at_pointer("/values/0/value").is_null());
  EXPECT_EQ(text_at(document, "/values/1/type"), "float");
  EXPECT_EQ(text_at(document, "/values/1/value"), "NaN");
  EXPECT_EQ(text_at(document, "/values/2/value"), "-170141183460469231731687303715884105729");
  EXPECT_EQ(text_at(document, "/values/3/type"), "bytes");
  EXPECT_EQ(text_at(document, "/values/3/value"), "00ff");
  EXPECT_TRUE(document.at_pointer("/values/4/value/0").get_bool().value());
  EXPECT_EQ(text_at(document, "/values/5/type"), "torch.dtype");
  EXPECT_EQ(text_at(document, "/values/5/value"), "torch.dtype('float32')");
}

// The JSON parser would obey a variable of its own; the library reads none.
TEST_F(Cli, TheEnvironmentDoesNotChooseHowManifestsAreRead) {
  save(100);
  const auto result = run_process({"/usr/bin/env", "SIMDJSON_FORCE_IMPLEMENTATION=bogus",
                                   STRANDLINE_BINARY_DIR "/strandline", "verify", path()});
  EXPECT_EQ(result.exit_code, kFine) << result.out << result.err;
}

// ---- verify ----

TEST_F(Cli, VerifyOfAnIntactCheckpointSaysSo) {
  save(100);
  for (const std::string& place : {path(), step_path(100).string()}) {
    const auto result = strandline_tool({"verify", place});
    EXPECT_EQ(result.exit_code, kFine);
    EXPECT_THAT(result.out, HasSubstr("step-00000100: intact (3 tensors, "));
    EXPECT_THAT(result.err, IsEmpty());  // No progress where there is no terminal.
  }
}

TEST_F(Cli, VerifyNamesTheTensorAndTheFileOfADamage) {
  save(100);
  flip_last_byte(shard(100));
  const auto result = strandline_tool({"verify", path()});
  EXPECT_EQ(result.exit_code, kDamaged);
  EXPECT_THAT(result.out, AllOf(HasSubstr("DAMAGED in "), HasSubstr("model.weight"),
                                HasSubstr(shard(100).filename().string())));
  const auto as_json = strandline_tool({"verify", path(), "--json"});
  EXPECT_EQ(as_json.exit_code, kDamaged);
  const auto document = json(as_json.out);
  EXPECT_EQ(text_at(document, "/checkpoints/0/verdict"), "damaged");
  EXPECT_EQ(text_at(document, "/checkpoints/0/damages/0/file"), shard(100).filename().string());
  EXPECT_EQ(text_at(document, "/checkpoints/0/damages/0/key"), "model.weight");
}

TEST_F(Cli, VerifyOfEveryFileFindsAFlippedByte) {
  save(100);
  for (const auto& file : fs::directory_iterator(step_path(100))) {
    const std::string content = content_of(file.path());
    flip_last_byte(file.path());
    const auto result = strandline_tool({"verify", step_path(100).string()});
    EXPECT_EQ(result.exit_code, kDamaged) << file.path();
    EXPECT_THAT(result.out, HasSubstr(file.path().filename().string()));
    write_content(file.path(), content);
  }
  EXPECT_EQ(strandline_tool({"verify", step_path(100).string()}).exit_code, kFine);
}

TEST_F(Cli, VerifyReportsWhatTheManifestDoesNotList) {
  save(100);
  write_content(step_path(100) / "model.safetensors", "planted");
  const auto result = strandline_tool({"verify", path()});
  EXPECT_EQ(result.exit_code, kDamaged);
  EXPECT_THAT(result.out, HasSubstr("'model.safetensors' is not in the manifest"));
}

TEST_F(Cli, VerifyReadsTheNewestUnlessToldOtherwise) {
  save(100);
  save(200);
  flip_last_byte(shard(100));
  EXPECT_EQ(strandline_tool({"verify", path()}).exit_code, kFine);
  EXPECT_EQ(strandline_tool({"verify", path(), "--step", "100"}).exit_code, kDamaged);
  const auto all = strandline_tool({"verify", path(), "--all"});
  EXPECT_EQ(all.exit_code, kDamaged);
  EXPECT_THAT(all.out, AllOf(HasSubstr("step-00000100: DAMAGED"), HasSubstr("200: intact")));
}

TEST_F(Cli, VerifyOfADirectoryNeverOverlooksAnUnreadableStep) {
  save(100);
  save(200);
  fs::remove(step_path(200) / "manifest.json");
  const auto result = strandline_tool({"verify", path()});
  EXPECT_EQ(result.exit_code, kDamaged);
  EXPECT_THAT(result.out, AllOf(HasSubstr("step-00000200: DAMAGED"), HasSubstr("100: intact")));
}

TEST_F(Cli, ANewerFormatIsUnreadableNotDamaged) {
  save(100);
  ASSERT_NO_FATAL_FAILURE(rewrite_manifest(step_path(100), "\"major\":1", "\"major\":2"));
  const auto verified = strandline_tool({"verify", path()});
  EXPECT_EQ(verified.exit_code, kUnreadable);
  EXPECT_THAT(verified.out, HasSubstr("unreadable: "));
  EXPECT_EQ(strandline_tool({"inspect", path()}).exit_code, kUnreadable);
  EXPECT_EQ(strandline_tool({"ls", path()}).exit_code, kUnreadable);
}

// ---- Terminals, pipes, signals ----

// A key or a note may hold what a terminal would obey: change the title, hide text, turn it around.
TEST_F(Cli, NothingFromAFileReachesTheTerminalUnescaped) {
  const std::string hostile =
      "\x1b]0;owned\x07\x1b[2J\r\b\x7f\n\xc2\x9b"
      "31m\xe2\x80\xae"
      "evil";
  save(100, {{hostile, TensorView::of(weights_)}, {"value", hostile}},
       {.metrics = {{hostile, 1}}, .metadata = {{hostile, hostile}}});
  const std::string step = step_path(100).string();
  flip_last_byte(step_path(100) / "rank-00000.json");
  const std::vector<std::vector<std::string>> commands = {
      {"ls", path()}, {"ls", path(), "--json"}, {"verify", step}, {"verify", step, "--json"}};
  const auto expect_harmless = [&](const std::vector<std::string>& command) {
    const auto result = strandline_tool(command);
    for (const char c : result.out + result.err) {
      EXPECT_TRUE(c == '\n' || (c >= ' ' && c <= '~')) << int{c} << " in\n" << result.out;
    }
    return result;
  };
  for (const auto& command : commands) expect_harmless(command);
  flip_last_byte(step_path(100) / "rank-00000.json");
  EXPECT_THAT(expect_harmless({"inspect", step}).out, HasSubstr("\\x1b]0;owned\\x07"));
  const auto as_json = expect_harmless({"inspect", step, "--json"});
  EXPECT_EQ(text_at(json(as_json.out), "/tensors/0/path/0"), hostile);
  expect_harmless({"inspect", step, "--keys", hostile + "?"});
  for (const auto& file : fs::directory_iterator(step_path(100))) {
    if (file.path().extension() == ".safetensors") flip_last_byte(file.path());
  }
  EXPECT_EQ(expect_harmless({"verify", step}).exit_code, kDamaged);
  // What the library would not write, but somebody else may.
  ASSERT_NO_FATAL_FAILURE(rewrite_manifest(step_path(100), "\"run\":\"", "\"run\":\"\\u001b[31m"));
  for (const std::string verb : {"ls", "inspect", "verify"}) expect_harmless({verb, path()});
}

TEST_F(Cli, LettersOfAllLanguagesStayReadable) {
  save(100, {{"größe", 1}, {"大きさ", 2}});
  EXPECT_THAT(strandline_tool({"inspect", path()}).out,
              AllOf(HasSubstr("größe"), HasSubstr("大きさ")));
}

TEST_F(Cli, AReaderThatWentAwayIsNoError) {
  save(100);
  std::array<int, 2> pipe{};
  ASSERT_EQ(pipe2(pipe.data(), O_CLOEXEC), 0);
  close(pipe[0]);
  ProcessOptions options;
  options.stdout_fd = pipe[1];
  for (const std::string verb : {"ls", "inspect", "verify"}) {
    const auto result = strandline_tool({verb, path()}, options);
    EXPECT_EQ(result.exit_code, kFine) << verb;
    EXPECT_THAT(result.err, IsEmpty()) << verb;
  }
  close(pipe[1]);
}

TEST_F(Cli, OutputThatCannotBeWrittenIsAnError) {
  save(100);
  ProcessOptions options;
  options.stdout_fd = open("/dev/full", O_WRONLY | O_CLOEXEC);
  ASSERT_GE(options.stdout_fd, 0);
  const auto result = strandline_tool({"ls", path()}, options);
  EXPECT_EQ(result.exit_code, kUnreadable);
  EXPECT_THAT(result.err, HasSubstr("cannot write to standard output: No space left"));
  close(options.stdout_fd);
}

TEST_F(Cli, CtrlCStopsVerify) {
  save(100);
  ProcessOptions options;
  options.interrupt_pending = true;
  for (const std::string how : {"--all", "--json"}) {
    const auto result = strandline_tool({"verify", path(), how}, options);
    EXPECT_EQ(result.exit_code, kInterrupted);
    EXPECT_EQ(result.signal, 0);
    EXPECT_THAT(result.out, IsEmpty());
    EXPECT_THAT(result.err, HasSubstr("interrupted"));
  }
}

TEST_F(Cli, VerifyShowsItsProgressOnATerminal) {
  save(100);
  Terminal terminal;
  ProcessOptions options;
  options.stderr_fd = terminal.inside();
  const auto result = strandline_tool({"verify", path()}, options);
  EXPECT_EQ(result.exit_code, kFine);
  const std::string line = terminal.shown();
  EXPECT_THAT(line, AllOf(StartsWith("\rverifying step 100: "), HasSubstr(" % of ")));
  EXPECT_EQ(line.back(), '\r');  // It is wiped out at the end.
}

// Goal: retention may delete a step that is being read, and that is no damage. Method: the terminal
// is stopped, so that verify is held at its first line of progress, after it opened the step and
// before it read all of it; it goes on once the step has been deleted. The step has more files than
// a reader keeps open, so that some have to be opened again.
TEST_F(Cli, AStepThatIsDeletedWhileItIsReadIsGoneNotDamaged) {
  StateDictBuilder builder;
  for (int group = 0; group < 40; ++group) {
    ASSERT_TRUE(builder.begin("group" + std::to_string(group), NodeKind::kDict));
    ASSERT_TRUE(builder.tensor("weight", TensorView::of(weights_)));
    ASSERT_TRUE(builder.end());
  }
  save(100, *builder.finish());
  Terminal terminal;
  ASSERT_EQ(tcflow(terminal.inside(), TCOOFF), 0);
  const int events = inotify_init1(IN_CLOEXEC);
  ASSERT_GE(inotify_add_watch(events, step_path(100).c_str(), IN_OPEN), 0);
  std::thread retention([&] {
    std::array<char, 4096> event;
    EXPECT_GT(read(events, event.data(), event.size()), 0);  // A file of the step was opened.
    fs::rename(step_path(100), directory_ / ".step-00000100.deleting");
    fs::remove_all(directory_ / ".step-00000100.deleting");
    tcflow(terminal.inside(), TCOON);
  });
  ProcessOptions options;
  options.stderr_fd = terminal.inside();
  const auto result = strandline_tool({"verify", step_path(100).string()}, options);
  retention.join();
  close(events);
  EXPECT_EQ(result.exit_code, kUnreadable) << result.out;
  EXPECT_THAT(result.out, HasSubstr("step-00000100: gone: "));
}

}  // namespace
}  // namespace strandline::testing
