// strandline: looks at checkpoints from outside, with or without the job that writes them.
//
// Verbs only read. Each one has a file of its own; this one parses the command line.

#include <CLI/CLI.hpp>
#include <csignal>
#include <iostream>
#include <string>
#include <system_error>

#include "output.h"
#include "strandline/version.h"
#include "verbs.h"

namespace {

using strandline::cli::complain;
using strandline::cli::ExitCode;

constexpr const char* kExitCodes = R"(Exit codes:
  0    fine
  1    damage was found (whatever else could be shown)
  2    wrong usage
  3    not found, not readable, a newer format, or an input/output error
  130  stopped by Ctrl-C)";

constexpr const char* kMainExamples = R"(Examples:
  strandline ls checkpoints
  strandline inspect checkpoints                  # the newest step
  strandline verify checkpoints/step-00001200

'strandline VERB --help' explains a verb and what it prints.

)";

constexpr const char* kLsFooter = R"(Columns:
  STEP      steps of training completed when it was saved
  SEQUENCE  order of the commits; the newest checkpoint has the highest
  PARENT    the sequence of the commit that its state comes from; - if from none
  CREATED   when it was saved, in local time
  SIZE      of all its files
  RUN       first digits of the id of the process that saved it
  METRICS   what the saver attached; or why the step is UNREADABLE

The newest is last; unreadable steps come first. Only manifests are read: 'verify' reads all.

Examples:
  strandline ls checkpoints
  strandline ls checkpoints --json | jq -r '.checkpoints[-1].name'

)";

constexpr const char* kInspectFooter =
    R"(Prints what the manifest says, the files, and a line for each tensor and plain value:
  KEY             the path to it; keys are joined by dots
  TYPE            element type of a tensor (as safetensors names it), or type of a value
  SHAPE, SIZE     of a tensor
  WHERE OR VALUE  the file that holds the tensor, or whose bytes it shares; or the value

Of a directory, the newest step that can be opened is shown; newer ones that cannot are named on
standard error. Tensor data is not read: 'verify' reads it.

Examples:
  strandline inspect checkpoints --step 1200
  strandline inspect checkpoints --keys model.encoder
  strandline inspect checkpoints --json | jq '.tensors[] | select(.dtype == "BF16") | .key'

)";

constexpr const char* kVerifyFooter =
    R"(Reads every byte of every file, compares it with its digest, and names each damage by
file and key. Of a directory, the newest step is read, and steps with an unreadable manifest are
reported.

Examples:
  strandline verify checkpoints/step-00001200
  strandline verify checkpoints --all --json

)";

struct Options {
  strandline::cli::LsOptions ls;
  strandline::cli::InspectOptions inspect;
  strandline::cli::VerifyOptions verify;
};

struct Verbs {
  CLI::App* ls = nullptr;
  CLI::App* inspect = nullptr;
  CLI::App* verify = nullptr;
};

// CLI11's own check prints a range of 300 digits.
std::string check_step(const std::string& text) {
  return text.substr(0, 1) == "-" ? "a step is 0 or more, not " + text : "";
}

void add_path(CLI::App& verb, std::string& path) {
  verb.add_option("PATH", path, "A directory of checkpoints, or one checkpoint")
      ->required()
      ->type_name("");
}

void add_step(CLI::App& verb, std::optional<std::int64_t>& step) {
  verb.add_option("--step", step, "The step to take, from a directory of checkpoints")
      ->type_name("N")
      ->check(check_step);
}

void add_json(CLI::App& verb, bool& json) {
  verb.add_flag("--json", json, "Print one JSON document (plain ASCII) instead of text");
}

Verbs declare(CLI::App& app, Options& options) {
  const std::string version = std::string("strandline ") + strandline::kVersion + " (format " +
                              std::to_string(strandline::kFormatMajor) + "." +
                              std::to_string(strandline::kFormatMinor) + ")";
  app.set_version_flag("--version", version, "Print the version and exit");
  app.footer(std::string(kMainExamples) + kExitCodes);
  app.get_formatter()->column_width(24);
  app.get_formatter()->label("SUBCOMMAND", "VERB");
  app.get_formatter()->label("Positionals", "Arguments");
  app.get_formatter()->label("REQUIRED", "");

  Verbs verbs;
  verbs.ls = app.add_subcommand("ls", "List the checkpoints of a directory")->group("Verbs");
  add_path(*verbs.ls, options.ls.path);
  add_json(*verbs.ls, options.ls.json);
  verbs.ls->footer(std::string(kLsFooter) + kExitCodes);

  verbs.inspect = app.add_subcommand("inspect", "Show what a checkpoint holds")->group("Verbs");
  add_path(*verbs.inspect, options.inspect.path);
  add_step(*verbs.inspect, options.inspect.step);
  verbs.inspect->add_option("--keys", options.inspect.keys, "Show only what lies below this key")
      ->type_name("KEY");
  add_json(*verbs.inspect, options.inspect.json);
  verbs.inspect->footer(std::string(kInspectFooter) + kExitCodes);

  verbs.verify =
      app.add_subcommand("verify", "Read all of a checkpoint and report damage")->group("Verbs");
  add_path(*verbs.verify, options.verify.path);
  add_step(*verbs.verify, options.verify.step);
  verbs.verify->add_flag("--all", options.verify.all, "Take every step of the directory");
  add_json(*verbs.verify, options.verify.json);
  verbs.verify->footer(std::string(kVerifyFooter) + kExitCodes);
  return verbs;
}

ExitCode run(const Verbs& verbs, const Options& options, strandline::cli::Output& output) {
  if (verbs.ls->parsed()) return run_ls(options.ls, output);
  if (verbs.inspect->parsed()) return run_inspect(options.inspect, output);
  return run_verify(options.verify, output);
}

}  // namespace

int main(int argc, char** argv) {
  // A closed pipe then fails the write, which ends the output quietly (see Output).
  std::signal(SIGPIPE, SIG_IGN);
  CLI::App app("Looks at Strandline checkpoints; never changes them.", "strandline");
  Options options;
  const Verbs verbs = declare(app, options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {
    return app.exit(request);  // Prints the help or the version.
  } catch (const CLI::ParseError& error) {
    complain(std::string(error.what()) + "; see strandline --help");
    return static_cast<int>(ExitCode::kUsage);
  }
  if (app.get_subcommands().empty()) {
    std::cerr << app.help();
    return static_cast<int>(ExitCode::kUsage);
  }
  strandline::cli::Output output;
  const ExitCode code = run(verbs, options, output);
  if (output.error() != 0) {
    complain("cannot write to standard output: " + std::generic_category().message(output.error()));
    return static_cast<int>(ExitCode::kUnreadable);
  }
  return static_cast<int>(code);
}
