// Paths that name one step: a directory with a manifest directly in it.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "strandline/checkpoint.h"
#include "strandline/storage.h"

namespace strandline::checkpoint {

// A step by itself: the storage that it lies in, and its name there.
struct StepPath {
  std::shared_ptr<Storage> storage;
  std::string name;

  [[nodiscard]] std::string text() const { return storage->path() + "/" + name; }
};

// Fails with kInvalidArgument on a path that names no entry of a directory, such as "/" or "..".
// Creates nothing; the step need not exist.
[[nodiscard]] Result<StepPath> split_step_path(const std::filesystem::path& path);

// Opens the step. One that was moved aside while it was being replaced, by a writer that died,
// counts where the step itself is absent. Fails with kNotFound. Blocks.
[[nodiscard]] Result<std::shared_ptr<ReadableDirectory>> open_step(const StepPath& step);

// Opens the step and calls `use` with it. If it turns out damaged and was replaced meanwhile by
// another process, does so again with the new one. Fails with what Checkpoint::open() or `use`
// failed with. Blocks.
[[nodiscard]] Result<Checkpoint> use_step(const StepPath& step,
                                          const std::function<Status(const Checkpoint&)>& use);

}  // namespace strandline::checkpoint
