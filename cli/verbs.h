// The verbs of the command-line tool: one options struct and one function each.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "output.h"
#include "strandline/error.h"

namespace strandline::cli {

// What the process returns. A worse finding never hides behind a lesser one: damage anywhere gives
// kDamaged, even where the rest could be shown.
enum class ExitCode : int {
  kFine = 0,
  kDamaged = 1,
  kUsage = 2,
  kUnreadable = 3,    // Not found, no rights, a newer format, an input/output error.
  kInterrupted = 130  // As a shell reports a program stopped by Ctrl-C.
};

// Damage is what `verify` is for; anything else kept us from looking.
[[nodiscard]] inline ExitCode exit_code_of(const Error& error) {
  return error.code == ErrorCode::kCorrupt ? ExitCode::kDamaged : ExitCode::kUnreadable;
}

// The more serious of two findings: damage, then unreadable, then fine.
[[nodiscard]] inline ExitCode worse(ExitCode a, ExitCode b) {
  if (a == ExitCode::kDamaged || b == ExitCode::kDamaged) return ExitCode::kDamaged;
  return a == ExitCode::kFine ? b : a;
}

struct LsOptions {
  std::string path;
  bool json = false;
};
[[nodiscard]] ExitCode run_ls(const LsOptions& options, Output& output);

struct InspectOptions {
  std::string path;
  std::optional<std::int64_t> step;
  std::string keys;  // The subtree to show; all of it if empty.
  bool json = false;
};
[[nodiscard]] ExitCode run_inspect(const InspectOptions& options, Output& output);

struct VerifyOptions {
  std::string path;
  std::optional<std::int64_t> step;
  bool all = false;
  bool json = false;
};
[[nodiscard]] ExitCode run_verify(const VerifyOptions& options, Output& output);

}  // namespace strandline::cli
