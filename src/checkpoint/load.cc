// load() and list_checkpoints(): reading without a Checkpointer.

#include <fmt/format.h>

#include <utility>

#include "base/no_throw.h"
#include "base/result_macros.h"
#include "checkpoint/catalog.h"
#include "checkpoint/newest.h"
#include "checkpoint/restorer.h"
#include "checkpoint/step_path.h"
#include "format/manifest.h"
#include "strandline/checkpoint.h"

namespace strandline::inline v0 {
namespace {

using checkpoint::Catalog;
using checkpoint::Destinations;
using checkpoint::StepPath;

// The nodes of the keys asked for, or the root.
Result<std::vector<std::uint32_t>> find_roots(const Checkpoint& checkpoint,
                                              const LoadOptions& options) {
  if (options.keys.empty()) return std::vector<std::uint32_t>{0};
  const Structure& structure = checkpoint.tree().structure();
  std::vector<std::uint32_t> roots;
  for (const auto& key : options.keys) {
    const auto* text = std::get_if<std::string>(&key);
    const auto node = text != nullptr ? structure.find(std::string_view(*text))
                                      : structure.find(std::get<KeyPath>(key));
    if (!node) {
      const std::string name = text != nullptr ? *text : key_path_text(std::get<KeyPath>(key));
      std::string known;
      for (std::uint32_t i = 1; i < structure.nodes()[0].end; i = structure.nodes()[i].end) {
        known += (known.empty() ? "" : ", ") + structure.path_text(i);
      }
      return failure(Error{.code = ErrorCode::kNotFound,
                           .message = fmt::format("'{}' has no key '{}'; at the top it has: {}",
                                                  checkpoint.path(), name, known),
                           .key_path = name,
                           .path = checkpoint.path()});
    }
    roots.push_back(*node);
  }
  return roots;
}

Status load_from(const Checkpoint& checkpoint, const LoadOptions& options, Loaded& loaded) {
  STRANDLINE_ASSIGN_OR_RETURN(loaded.roots, find_roots(checkpoint, options));
  const Structure& structure = checkpoint.tree().structure();
  std::vector<bool> wanted(structure.tensors().size(), false);
  for (const std::uint32_t root : loaded.roots) {
    for (std::uint32_t i = root; i < structure.nodes()[root].end; ++i) {
      if (structure.nodes()[i].kind == NodeKind::kTensor) wanted[structure.nodes()[i].leaf] = true;
    }
  }
  Destinations destinations(checkpoint);
  STRANDLINE_RETURN_IF_ERROR(destinations.allocate(wanted, options.allocate));
  STRANDLINE_RETURN_IF_ERROR(checkpoint.read(destinations.reads(), options.progress));
  loaded.state = std::move(destinations.state());
  loaded.step = checkpoint.info().step;
  return {};
}

// The step that `path` is, if it is one: with a manifest directly in it.
std::optional<StepPath> as_step(const std::filesystem::path& path) {
  std::error_code ignored;
  // From within: "." and ".." name a step too.
  const bool dots = path.filename() == "." || path.filename() == "..";
  const auto step =
      checkpoint::split_step_path(dots ? std::filesystem::canonical(path, ignored) : path);
  if (!step) return std::nullopt;
  const auto directory = checkpoint::open_step(*step);
  if (!directory || !(*directory)->file_bytes(format::kManifestName)) return std::nullopt;
  return *step;
}

// Loads from one step, which must be the one that was asked for, if one was.
Status load_from_step(const std::filesystem::path& path, const Checkpoint& checkpoint,
                      const LoadOptions& options, Loaded& loaded) {
  if (!options.step || *options.step == checkpoint.info().step) {
    return load_from(checkpoint, options, loaded);
  }
  return failure(Error{.code = ErrorCode::kInvalidArgument,
                       .message = fmt::format("'{}' is the directory of step {}, but step {} "
                                              "was asked for; give the directory above it",
                                              path.string(), checkpoint.info().step, *options.step),
                       .path = path.string()});
}

Error nothing_there(const std::filesystem::path& path) {
  return Error{.code = ErrorCode::kNotFound,
               .message = fmt::format("there is no checkpoint at '{}', neither steps nor a "
                                      "manifest.json; check the path, or bring back a copy",
                                      path.string()),
               .path = path.string()};
}

Result<Loaded> load_from_path(const std::filesystem::path& path, const LoadOptions& options) {
  Loaded loaded;
  if (const std::optional<StepPath> step = as_step(path)) {
    STRANDLINE_RETURN_IF_ERROR(checkpoint::use_step(*step, [&](const Checkpoint& checkpoint) {
      return load_from_step(path, checkpoint, options, loaded);
    }));
    return loaded;
  }
  STRANDLINE_ASSIGN_OR_RETURN(const auto storage, open_posix_storage(path));
  std::vector<std::string> warnings;
  STRANDLINE_ASSIGN_OR_RETURN(
      const std::optional<Checkpoint> used,
      checkpoint::use_newest(
          *storage, options.step,
          [&](const Checkpoint& checkpoint) { return load_from(checkpoint, options, loaded); },
          warnings));
  if (!used) return failure(nothing_there(path));
  loaded.warnings = std::move(warnings);
  return loaded;
}

}  // namespace

Result<Loaded> load(const std::filesystem::path& path, const LoadOptions& options) {
  return base::no_throw("loading", [&] { return load_from_path(path, options); });
}

Result<std::vector<StepEntry>> list_checkpoints(const std::filesystem::path& directory) {
  return base::no_throw("listing checkpoints", [&]() -> Result<std::vector<StepEntry>> {
    std::error_code ignored;
    if (!std::filesystem::exists(directory, ignored)) return failure(nothing_there(directory));
    STRANDLINE_ASSIGN_OR_RETURN(const auto storage, open_posix_storage(directory));
    STRANDLINE_ASSIGN_OR_RETURN(const Catalog catalog, Catalog::read(*storage));
    return catalog.entries();
  });
}

}  // namespace strandline::inline v0
