// strandline verify: reads every byte of a checkpoint and reports what is damaged.
//
// A job may go on writing and deleting steps meanwhile. A step that another one replaced, or that
// retention removed, while it was being read is reported as gone: that is no damage.

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

#include "json.h"
#include "locate.h"
#include "strandline/checkpoint.h"
#include "text.h"
#include "verbs.h"

namespace strandline::cli {
namespace {

using Clock = std::chrono::steady_clock;

volatile std::sig_atomic_t interrupted = 0;

extern "C" void note_interrupt(int) { interrupted = 1; }

// While it lives, the first Ctrl-C asks for a clean stop; the second one kills the process, should
// a read hang. Left alone where Ctrl-C is ignored, as in a background job of a script.
class InterruptWatch {
 public:
  InterruptWatch() {
    if (sigaction(SIGINT, nullptr, &before_) != 0 || before_.sa_handler == SIG_IGN) return;
    struct sigaction action {};
    action.sa_handler = note_interrupt;
    action.sa_flags = SA_RESTART | static_cast<int>(SA_RESETHAND);
    installed_ = sigaction(SIGINT, &action, nullptr) == 0;
    // Whoever started us may have blocked it.
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_UNBLOCK, &set, nullptr);
  }
  ~InterruptWatch() {
    if (installed_) sigaction(SIGINT, &before_, nullptr);
  }
  InterruptWatch(const InterruptWatch&) = delete;
  InterruptWatch& operator=(const InterruptWatch&) = delete;

 private:
  struct sigaction before_ {};
  bool installed_ = false;
};

// One line on standard error that tells how far the reading is; nothing where that is no terminal.
class ProgressLine {
 public:
  explicit ProgressLine(std::string what) : what_(std::move(what)) {}
  ~ProgressLine() {
    if (shown_) std::fputs(fmt::format("\r{:{}}\r", "", kWidth).c_str(), stderr);
  }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void update(std::uint64_t done, std::uint64_t total) {
    const Clock::time_point now = Clock::now();
    if (!is_terminal_ || (shown_ && now - last_ < kInterval)) return;
    const double share = total == 0 ? 1 : static_cast<double>(done) / static_cast<double>(total);
    const std::string line =
        fmt::format("{}: {:.0f} % of {}", what_, share * 100, human_bytes(total));
    std::fputs(fmt::format("\r{:{}}", line, kWidth).c_str(), stderr);
    shown_ = true;
    last_ = now;
  }

 private:
  static constexpr int kWidth = 60;
  static constexpr std::chrono::milliseconds kInterval{100};  // Faster is not read anyway.

  std::string what_;
  bool is_terminal_ = isatty(STDERR_FILENO) == 1;
  bool shown_ = false;
  Clock::time_point last_{};
};

struct Finding {
  enum class Kind { kIntact, kDamaged, kUnreadable, kGone };
  Kind kind = Kind::kIntact;
  std::filesystem::path path;
  std::int64_t step = 0;
  std::uint64_t bytes = 0;
  std::size_t files = 0;
  std::size_t tensors = 0;
  double seconds = 0;
  std::vector<Damage> damages;
  std::string reason;  // For kUnreadable and kGone.
};

std::string_view kind_name(Finding::Kind kind) {
  switch (kind) {
    case Finding::Kind::kIntact:
      return "intact";
    case Finding::Kind::kDamaged:
      return "damaged";
    case Finding::Kind::kUnreadable:
      return "unreadable";
    case Finding::Kind::kGone:
      return "gone";
  }
  return "unknown";
}

ExitCode exit_code_of(Finding::Kind kind) {
  switch (kind) {
    case Finding::Kind::kIntact:
      return ExitCode::kFine;
    case Finding::Kind::kDamaged:
      return ExitCode::kDamaged;
    case Finding::Kind::kUnreadable:
    case Finding::Kind::kGone:
      return ExitCode::kUnreadable;
  }
  return ExitCode::kUnreadable;
}

// What an error met while opening or reading means for the checkpoint.
void add_error(Finding& finding, const Error& error) {
  if (error.code == ErrorCode::kCorrupt) {
    finding.kind = Finding::Kind::kDamaged;
    const std::string file = std::filesystem::path(error.path).filename().string();
    finding.damages.push_back({file, error.key_path, error.text()});
  } else {
    finding.kind = Finding::Kind::kUnreadable;
    finding.reason = error.text();
  }
}

void read_everything(Finding& finding, const Checkpoint& checkpoint) {
  const CheckpointInfo& info = checkpoint.info();
  finding.step = info.step;
  finding.bytes = info.bytes;
  finding.files = info.files.size() + 1;  // The manifest lists every file but itself.
  finding.tensors = checkpoint.stored().size();
  ProgressLine line(fmt::format("verifying step {}", info.step));
  const Clock::time_point begin = Clock::now();
  auto damages = checkpoint.verify([&](std::uint64_t done, std::uint64_t total) {
    line.update(done, total);
    return interrupted == 0;
  });
  finding.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  if (!damages) return add_error(finding, damages.error());
  finding.damages = std::move(*damages);
  if (!finding.damages.empty()) finding.kind = Finding::Kind::kDamaged;
}

// REQUIRES: a path at which a checkpoint was seen.
Finding verify_one(const std::filesystem::path& path, std::int64_t step) {
  Finding finding;
  finding.path = path;
  finding.step = step;
  const DirectoryIdentity before = directory_identity(path);
  auto checkpoint = Checkpoint::open(path);
  if (checkpoint) {
    read_everything(finding, *checkpoint);
  } else {
    add_error(finding, error_of_step(checkpoint.error()));
  }
  if (finding.kind != Finding::Kind::kIntact && (!before || directory_identity(path) != before)) {
    finding.kind = Finding::Kind::kGone;
    finding.damages.clear();
    finding.reason = "it was replaced or removed while it was being read";
  }
  return finding;
}

std::string text_of(const Finding& finding) {
  const std::string path = printable(finding.path.string());
  switch (finding.kind) {
    case Finding::Kind::kIntact:
      return fmt::format("{}: intact ({}, {}, {}; read in {:.2f} s)\n", path,
                         counted(finding.tensors, "tensor"), counted(finding.files, "file"),
                         human_bytes(finding.bytes), finding.seconds);
    case Finding::Kind::kUnreadable:
    case Finding::Kind::kGone:
      return fmt::format("{}: {}: {}\n", path, kind_name(finding.kind), printable(finding.reason));
    case Finding::Kind::kDamaged:
      break;
  }
  Table table({{"FILE"}, {"KEY"}, {"DAMAGE"}});
  for (const Damage& damage : finding.damages) {
    table.add_row({damage.file.empty() ? "-" : damage.file,
                   damage.key_path.empty() ? "-" : damage.key_path, damage.message});
  }
  return fmt::format("{}: DAMAGED in {}\n{}", path, counted(finding.damages.size(), "place"),
                     table.text(2));
}

std::string json_of(const std::vector<Finding>& findings) {
  JsonWriter json;
  json.begin_object().key("checkpoints").begin_array();
  for (const Finding& finding : findings) {
    json.begin_object().key("path").text(finding.path.string()).key("step").number(finding.step);
    json.key("verdict").text(kind_name(finding.kind)).key("bytes").number(finding.bytes);
    json.key("reason");
    finding.reason.empty() ? json.null() : json.text(finding.reason);
    json.key("damages").begin_array();
    for (const Damage& damage : finding.damages) {
      json.begin_object().key("file").text(damage.file).key("key").text(damage.key_path);
      json.key("message").text(damage.message).end_object();
    }
    json.end_array().end_object();
  }
  json.end_array().end_object();
  return json.finish();
}

struct Target {
  std::filesystem::path path;
  std::int64_t step = 0;
};

// What to read. Of a directory of checkpoints: the newest, and every step whose manifest is
// unreadable, since such a step may be the newest.
Result<std::vector<Target>> find_targets(const VerifyOptions& options) {
  const std::filesystem::path directory = options.path;
  if (is_checkpoint(directory)) return std::vector<Target>{{directory, 0}};
  if (options.step) {
    auto entry = find_step(directory, *options.step);
    if (!entry) return failure(entry.error());
    return std::vector<Target>{{directory / entry->name, entry->step}};
  }
  auto steps = find_steps(directory);
  if (!steps) return failure(steps.error());
  std::vector<Target> targets;
  for (std::size_t i = 0; i < steps->size(); ++i) {
    const StepEntry& entry = (*steps)[i];
    const bool is_newest = i + 1 == steps->size();
    if (options.all || is_newest || !entry.info) {
      targets.push_back({directory / entry.name, entry.step});
    }
  }
  return targets;
}

}  // namespace

ExitCode run_verify(const VerifyOptions& options, Output& output) {
  if (options.step && options.all) {
    complain("--step and --all exclude each other");
    return ExitCode::kUsage;
  }
  if ((options.step || options.all) && is_checkpoint(options.path)) {
    complain("--step and --all need a directory of checkpoints; '" + options.path +
             "' is one checkpoint");
    return ExitCode::kUsage;
  }
  const InterruptWatch watch;
  const auto targets = find_targets(options);
  if (!targets) {
    complain(targets.error().text());
    return exit_code_of(targets.error());
  }
  ExitCode code = ExitCode::kFine;
  std::vector<Finding> findings;
  for (const Target& target : *targets) {
    Finding finding = verify_one(target.path, target.step);
    if (interrupted != 0) {
      complain("interrupted; what was not reported was not read");
      return ExitCode::kInterrupted;
    }
    // With --all, steps come and go while a job runs; otherwise the one asked for was not read.
    const bool is_expected = options.all && finding.kind == Finding::Kind::kGone;
    if (!is_expected) code = worse(code, exit_code_of(finding.kind));
    if (!options.json) output.write(text_of(finding));
    findings.push_back(std::move(finding));
    if (output.closed()) break;
  }
  if (options.json) output.write(json_of(findings));
  return code;
}

}  // namespace strandline::cli
