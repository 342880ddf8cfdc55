// The functions save() and load(): one checkpoint, without a Checkpointer.

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "collect.h"
#include "errors.h"
#include "gil.h"
#include "options.h"
#include "progress.h"
#include "rebuild.h"
#include "strandline/checkpointer.h"

namespace strandline::python {
namespace {

void save_one(nb::handle path, nb::handle state, nb::handle metrics, nb::handle metadata,
              const std::map<std::string, std::string>& extra_files, bool allow_pickle) {
  const auto began = std::chrono::steady_clock::now();
  const Collected collected = collect(state, allow_pickle);
  SaveOptions options;
  options.metrics = metrics_of(metrics);
  options.metadata = metadata_of(metadata);
  options.extra_files = extra_files;
  options.collect_time = std::chrono::steady_clock::now() - began;
  SignalWatch signals;
  options.interrupted = signals.callback();
  const std::filesystem::path target = path_of(path);
  Status result = without_gil([&] { return strandline::save(target, collected.state, options); });
  signals.raise_pending();
  unwrap(std::move(result));
}

// The objects of all tensors below the roots that were loaded.
TensorObjects objects_below(const Loaded& loaded, const Allocations& allocations) {
  const Structure& structure = loaded.state.structure();
  TensorObjects objects(structure.tensors().size());
  for (const std::uint32_t root : loaded.roots) {
    for (std::uint32_t i = root; i < structure.nodes()[root].end; ++i) {
      const Structure::Node& node = structure.nodes()[i];
      if (node.kind != NodeKind::kTensor || objects[node.leaf].is_valid()) continue;
      objects[node.leaf] =
          allocations.object_of(structure, node.leaf, loaded.state.tensors()[node.leaf]);
    }
  }
  return objects;
}

// (the trees, step, warnings). `keys` None gives one tree: the whole one.
nb::object load_some(nb::handle path, const std::optional<std::vector<nb::object>>& keys,
                     std::optional<std::int64_t> step, bool allow_pickle, nb::object progress) {
  LoadOptions options;
  if (keys) {
    for (const nb::object& key : *keys) options.keys.push_back(key_path_of(key));
  }
  options.step = step;
  Allocations allocations;
  PythonProgress python_progress(std::move(progress));
  options.allocate = allocations.allocator();
  options.progress = python_progress.callback();
  const std::filesystem::path source = path_of(path);
  Result<Loaded> result = without_gil([&] { return strandline::load(source, options); });
  python_progress.raise_pending();
  allocations.raise_pending();
  const Loaded loaded = unwrap(std::move(result));
  const TensorObjects objects = objects_below(loaded, allocations);
  nb::list trees;
  for (const std::uint32_t root : loaded.roots) {
    trees.append(tree_of(loaded.state, root, objects, values_of(loaded.state, root, allow_pickle)));
  }
  return nb::make_tuple(trees, loaded.step, loaded.warnings);
}

}  // namespace

void bind_functions(nb::module_& module) {
  module.def("save", &save_one, nb::arg("path").none(), nb::arg("state").none(),
             nb::arg("metrics").none(), nb::arg("metadata").none(), nb::arg("extra_files"),
             nb::arg("allow_pickle"), "Saves one checkpoint, durable when the call returns.");
  module.def(
      "load", &load_some, nb::arg("path").none(), nb::arg("keys").none(), nb::arg("step").none(),
      nb::arg("allow_pickle"), nb::arg("progress").none(),
      nb::sig(
          "def load(path: object, keys: collections.abc.Sequence[object] | None, step: int | None, "
          "allow_pickle: bool, progress: object | None) -> "
          "tuple[list[object], int, list[str]]"),
      "The trees at the keys (the whole tree for None), the step, and warnings.");
}

}  // namespace strandline::python
