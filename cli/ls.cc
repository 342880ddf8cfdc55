// strandline ls: the committed steps of a directory.

#include <fmt/format.h>

#include <filesystem>
#include <utility>
#include <vector>

#include "json.h"
#include "locate.h"
#include "strandline/checkpoint.h"
#include "text.h"
#include "verbs.h"

namespace strandline::cli {
namespace {

constexpr std::size_t kRunDigitsShown = 8;  // Of 32; enough to tell the runs of a directory apart.
constexpr std::size_t kMetricsShownMax = 100;

std::string metrics_text(const std::map<std::string, double>& metrics) {
  std::string text;
  for (const auto& [name, value] : metrics) {
    text += fmt::format("{}{}={:g}", text.empty() ? "" : " ", name, value);
  }
  return shortened(text, kMetricsShownMax);
}

std::string table_of(const std::vector<StepEntry>& steps) {
  Table table({{"STEP", true},
               {"SEQUENCE", true},
               {"PARENT", true},
               {"CREATED"},
               {"SIZE", true},
               {"RUN"},
               {"METRICS"}});
  for (const StepEntry& entry : steps) {
    const std::string step = std::to_string(entry.step);
    if (!entry.info) {
      const std::string reason = entry.error ? entry.error->text() : "its manifest is missing";
      table.add_row({step, "-", "-", "-", "-", "-", "UNREADABLE: " + reason});
      continue;
    }
    const CheckpointInfo& info = *entry.info;
    table.add_row({step, std::to_string(info.sequence),
                   info.parent ? std::to_string(*info.parent) : "-", local_time(info.created_ns),
                   human_bytes(info.bytes), info.run.substr(0, kRunDigitsShown),
                   metrics_text(info.metrics)});
  }
  return table.text();
}

std::string json_of(const std::string& directory, const std::vector<StepEntry>& steps) {
  JsonWriter json;
  json.begin_object().key("directory").text(directory);
  json.key("checkpoints").begin_array();
  for (const StepEntry& entry : steps) {
    json.begin_object().key("name").text(entry.name);
    if (entry.info) {
      add_info(json, *entry.info);
    } else {
      json.key("step").number(entry.step);
    }
    json.key("error");
    entry.error ? json.text(entry.error->text()) : json.null();
    json.end_object();
  }
  json.end_array().end_object();
  return json.finish();
}

// One checkpoint listed by its own path, as `ls FILE` lists a file.
Result<std::vector<StepEntry>> list_one(const std::filesystem::path& path) {
  auto checkpoint = Checkpoint::open(path);
  if (!checkpoint) return failure(checkpoint.error());
  StepEntry entry;
  entry.name = path.filename().string();
  entry.step = checkpoint->info().step;
  entry.info = checkpoint->info();
  return std::vector<StepEntry>{std::move(entry)};
}

}  // namespace

ExitCode run_ls(const LsOptions& options, Output& output) {
  auto steps =
      is_checkpoint(options.path) ? list_one(options.path) : list_checkpoints(options.path);
  if (!steps) {
    complain(steps.error().text());
    return exit_code_of(steps.error());
  }
  if (options.json) {
    output.write(json_of(options.path, *steps));
  } else if (steps->empty()) {
    complain("no committed checkpoint in '" + options.path + "'");
  } else {
    output.write(table_of(*steps));
  }
  ExitCode code = ExitCode::kFine;
  for (const StepEntry& entry : *steps) {
    if (!entry.info && entry.error) code = worse(code, exit_code_of(error_of_step(*entry.error)));
  }
  return code;
}

}  // namespace strandline::cli
