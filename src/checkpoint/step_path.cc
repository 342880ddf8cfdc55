#include "checkpoint/step_path.h"

#include <fmt/format.h>

#include <utility>

#include "base/result_macros.h"
#include "checkpoint/catalog.h"
#include "format/names.h"

namespace strandline::checkpoint {
namespace {

// Reading takes seconds and a replacement follows a whole save: more in a row than this mean that
// something else is wrong.
constexpr int kRestartsMax = 16;

// Which save wrote what is there now; empty if that cannot be read.
std::string written_by(const Result<std::shared_ptr<ReadableDirectory>>& directory) {
  if (!directory) return {};
  const Result<CheckpointInfo> info = read_info(**directory);
  return info ? fmt::format("{} {}", info->run, info->sequence) : std::string();
}

}  // namespace

Result<StepPath> split_step_path(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::path absolute = std::filesystem::absolute(path, error);
  // "a/b/" names the same directory as "a/b".
  if (!absolute.has_filename()) absolute = absolute.parent_path();
  const std::string name = absolute.filename().string();
  if (path.empty() || error || name.empty() || name == "." || name == "..") {
    return failure(Error{.code = ErrorCode::kInvalidArgument,
                         .message = fmt::format("'{}' cannot name a checkpoint; give the path of "
                                                "its directory",
                                                path.string()),
                         .path = path.string()});
  }
  StepPath step;
  STRANDLINE_ASSIGN_OR_RETURN(step.storage, open_posix_storage(absolute.parent_path()));
  step.name = name;
  return step;
}

Result<std::shared_ptr<ReadableDirectory>> open_step(const StepPath& step) {
  auto directory = step.storage->open(step.name);
  if (directory || directory.error().code != ErrorCode::kNotFound) return directory;
  STRANDLINE_ASSIGN_OR_RETURN(const std::vector<std::string> names, step.storage->list());
  for (const std::string& name : names) {
    const format::DirectoryName parsed = format::parse_directory_name(name);
    if (parsed.kind != format::DirectoryName::Kind::kReplaced || parsed.final_name != step.name) {
      continue;
    }
    auto aside = step.storage->open(name);
    if (aside && read_info(**aside)) return aside;
  }
  return directory;
}

Result<Checkpoint> use_step(const StepPath& step,
                            const std::function<Status(const Checkpoint&)>& use) {
  for (int restart = 0;; ++restart) {
    auto directory = open_step(step);
    if (!directory) return failure(std::move(directory).error());
    const std::string before = written_by(directory);
    Result<Checkpoint> checkpoint = Checkpoint::open(std::move(*directory));
    const Status used = checkpoint ? use(*checkpoint) : Status(failure(checkpoint.error()));
    if (used) return checkpoint;
    const ErrorCode code = used.error().code;
    const bool may_have_vanished =
        code == ErrorCode::kCorrupt || code == ErrorCode::kIo || code == ErrorCode::kNotFound;
    if (!may_have_vanished || restart == kRestartsMax) return failure(with_remedy(used.error()));
    const std::string now = written_by(open_step(step));
    if (now.empty() || now == before) return failure(with_remedy(used.error()));
  }
}

}  // namespace strandline::checkpoint
