// The engine's Checkpointer in Python. Every call that may block runs without the GIL; see gil.h.

#include "strandline/checkpointer.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <memory>
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

namespace strandline::python {
namespace {

// What restore() in Python needs to bring the job up to date.
struct RestoredTree {
  std::int64_t step = 0;
  nb::object tree;                      // The saved tree; matched tensors are the job's own.
  std::vector<StatefulObject> objects;  // Whose load_state_dict() is to be called.
  std::vector<nb::object> tensors;      // The job's own.
  std::vector<std::string> missing;     // Names that were left alone, only in the job
  std::vector<std::string> unexpected;  // and only in the checkpoint.
  std::vector<std::string> warnings;
};

// How long close() still waits for saves; the wait that Ctrl-C can end comes before it.
constexpr std::chrono::milliseconds kCloseGrace{1000};

// Owns an engine. The destructor waits for running saves, so it gives up the GIL.
class Engine {
 public:
  Engine(nb::handle directory, CheckpointerOptions options) : finish_wait_(options.finish_wait) {
    options.finish_wait = std::min(options.finish_wait, kCloseGrace);
    const std::filesystem::path path = path_of(directory);
    engine_.emplace(
        unwrap(without_gil([&] { return Checkpointer::open(path, std::move(options)); })));
  }
  ~Engine() {
    without_gil([&] {
      // What went wrong is dropped with the engine; close() is how to hear of it. After close()
      // only saves are left that it has given up: the engine waits for those as it must.
      if (!close_called_) (void)engine_->wait_until_finished(finish_wait_);
      engine_.reset();
    });
  }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  Save save(std::int64_t step, nb::handle state, nb::handle metrics, nb::handle metadata,
            bool overwrite, const std::map<std::string, std::string>& extra_files,
            bool allow_pickle) {
    const auto began = std::chrono::steady_clock::now();
    const Collected collected = collect(state, allow_pickle);
    SaveOptions options;
    options.metrics = metrics_of(metrics);
    options.metadata = metadata_of(metadata);
    options.overwrite = overwrite;
    options.extra_files = extra_files;
    SignalWatch signals;
    options.interrupted = signals.callback();
    options.collect_time = std::chrono::steady_clock::now() - began;
    auto result = without_gil([&] { return engine_->save(step, collected.state, options); });
    signals.raise_pending();
    return unwrap(std::move(result));
  }

  std::optional<RestoredTree> restore(nb::handle state, std::optional<std::int64_t> step,
                                      bool strict, bool verify_first, bool allow_pickle,
                                      nb::object progress);

  [[nodiscard]] std::optional<std::int64_t> latest_step() const {
    return unwrap(without_gil([&] { return engine_->latest_step(); }));
  }
  [[nodiscard]] std::vector<std::int64_t> steps() const {
    return unwrap(without_gil([&] { return engine_->steps(); }));
  }

  // Whether no save was running before the deadline.
  [[nodiscard]] bool wait_until_finished(double deadline_s) const {
    return wait(milliseconds_of(deadline_s));
  }

  [[nodiscard]] std::vector<nb::object> failures() const {
    std::vector<nb::object> exceptions;
    for (const Error& error : engine_->failures()) exceptions.push_back(exception_of(error));
    return exceptions;
  }

  void close() {
    close_called_ = true;
    unwrap(without_gil([&] { return engine_->close(); }));
  }

  [[nodiscard]] std::string path() const { return engine_->path(); }
  [[nodiscard]] std::string run() const { return engine_->run(); }
  [[nodiscard]] std::uint64_t host_bytes_mapped() const { return engine_->host_bytes_mapped(); }

 private:
  [[nodiscard]] bool wait(std::chrono::milliseconds deadline) const {
    Status ended;
    const bool in_time = wait_in_slices(deadline, [&](auto slice) {
      ended = engine_->wait_until_finished(slice);
      return ended || ended.error().code != ErrorCode::kTimeout;
    });
    if (in_time) unwrap(std::move(ended));
    return in_time;
  }

  std::optional<Checkpointer> engine_;
  std::chrono::milliseconds finish_wait_;
  bool close_called_ = false;  // Used with the GIL, or by the destructor.
};

void check_loadable(const Collected& collected) {
  for (const StatefulObject& stateful : collected.objects) {
    if (nb::hasattr(stateful.object, "load_state_dict")) continue;
    raise(Error{.code = ErrorCode::kUnsupported,
                .message = "cannot restore '" + stateful.key_path +
                           "': its object has state_dict() but no load_state_dict(); give it one, "
                           "or take it out of the job and use strandline.load()",
                .key_path = stateful.key_path});
  }
}

TensorObjects objects_of(const Restored& restored, const Collected& collected,
                         const Allocations& allocations) {
  const Structure& structure = restored.state.structure();
  TensorObjects objects;
  objects.reserve(structure.tensors().size());
  for (std::uint32_t i = 0; i < structure.tensors().size(); ++i) {
    const auto destination = restored.destination[i];
    const TensorView& view = restored.state.tensors()[i];
    if (destination) {
      objects.push_back(collected.tensors[*destination]);
    } else if (view.data == nullptr && view.byte_count() > 0) {
      objects.emplace_back();  // A name that is left alone (`strict` off).
    } else {
      objects.push_back(allocations.object_of(structure, i, view));
    }
  }
  return objects;
}

std::optional<RestoredTree> Engine::restore(nb::handle state, std::optional<std::int64_t> step,
                                            bool strict, bool verify_first, bool allow_pickle,
                                            nb::object progress) {
  Collected collected = collect(state, allow_pickle);
  check_loadable(collected);
  Allocations allocations;
  PythonProgress python_progress(std::move(progress));
  RestoreOptions options;
  options.step = step;
  options.strict = strict;
  options.verify_first = verify_first;
  for (const StatefulObject& stateful : collected.objects) options.objects.push_back(stateful.node);
  options.allocate = allocations.allocator();
  PreparedValues values(allow_pickle);
  options.accept = values.callback();
  options.progress = python_progress.callback();
  auto result = without_gil([&] { return engine_->restore(collected.state, options); });
  python_progress.raise_pending();
  allocations.raise_pending();
  values.raise_pending();
  const std::optional<Restored> restored = unwrap(std::move(result));
  if (!restored) return std::nullopt;
  RestoredTree tree;
  tree.step = restored->step;
  tree.tree =
      tree_of(restored->state, 0, objects_of(*restored, collected, allocations), values.values());
  tree.objects = std::move(collected.objects);
  tree.tensors = std::move(collected.tensors);
  tree.missing = restored->missing;
  tree.unexpected = restored->unexpected;
  tree.warnings = restored->warnings;
  return tree;
}

void bind_options(nb::module_& module) {
  using Options = CheckpointerOptions;
  nb::class_<Options>(module, "Options", "Options of a Checkpointer.")
      .def(nb::init<>())
      .def_rw("keep", &Options::keep, nb::arg("value").none())
      .def_rw("verify_data", &Options::verify_data)
      .def_rw("opened_at", &Options::opened_at)
      .def_rw("host_bytes_max", &Options::host_bytes_max, nb::arg("value").none())
      .def_rw("copy_threads", &Options::copy_threads, nb::arg("value").none())
      .def(
          "set_policies",
          [](Options& options, bool raise_errors, bool skip_when_memory_is_full) {
            options.on_error = raise_errors ? ErrorPolicy::kRaise : ErrorPolicy::kWarn;
            options.when_memory_is_full =
                skip_when_memory_is_full ? MemoryPolicy::kSkip : MemoryPolicy::kWait;
          },
          nb::kw_only(), nb::arg("raise_errors"), nb::arg("skip_when_memory_is_full"))
      .def(
          "set_waits",
          [](Options& options, double memory_s, double finish_s) {
            options.memory_wait = milliseconds_of(memory_s);
            options.finish_wait = milliseconds_of(finish_s);
          },
          nb::kw_only(), nb::arg("memory_s"), nb::arg("finish_s"));
}

void bind_restored(nb::module_& module) {
  nb::class_<RestoredTree>(module, "RestoredTree", "What restore() read.")
      .def_ro("step", &RestoredTree::step)
      .def_prop_ro("tree", [](const RestoredTree& restored) { return restored.tree; })
      .def_prop_ro(
          "objects",
          [](const RestoredTree& restored) {
            std::vector<nb::object> objects;
            for (const StatefulObject& stateful : restored.objects) {
              objects.push_back(stateful.object);
            }
            return objects;
          },
          "The objects whose load_state_dict() is to be called.")
      .def_prop_ro(
          "tensors", [](const RestoredTree& restored) { return restored.tensors; },
          "The tensors and arrays of the job.")
      .def_ro("missing", &RestoredTree::missing)
      .def_ro("unexpected", &RestoredTree::unexpected)
      .def_ro("warnings", &RestoredTree::warnings);
}

}  // namespace

void bind_checkpointer(nb::module_& module) {
  bind_options(module);
  bind_restored(module);
  nb::class_<Engine>(module, "Checkpointer", "The engine behind strandline.Checkpointer.")
      .def(
          "__init__",
          [](Engine* self, nb::handle directory, const CheckpointerOptions& options) {
            new (self) Engine(directory, options);
          },
          nb::arg("directory").none(), nb::arg("options"))
      .def("save", &Engine::save, nb::arg("step"), nb::arg("state").none(), nb::kw_only(),
           nb::arg("metrics").none(), nb::arg("metadata").none(), nb::arg("overwrite"),
           nb::arg("extra_files"), nb::arg("allow_pickle"))
      .def("restore", &Engine::restore, nb::arg("state").none(), nb::kw_only(),
           nb::arg("step").none(), nb::arg("strict"), nb::arg("verify_first"),
           nb::arg("allow_pickle"), nb::arg("progress").none())
      .def("latest_step", &Engine::latest_step)
      .def("steps", &Engine::steps)
      .def("wait_until_finished", &Engine::wait_until_finished, nb::arg("deadline_s"),
           "Whether no save was running before the deadline.")
      .def("failures", &Engine::failures)
      .def("close", &Engine::close)
      .def_prop_ro(
          "path", [](const Engine& engine) { return text_of_path(engine.path()); },
          nb::sig("def path(self) -> str"))
      .def_prop_ro("run", &Engine::run)
      .def_prop_ro("host_bytes_mapped", &Engine::host_bytes_mapped);
}

}  // namespace strandline::python
