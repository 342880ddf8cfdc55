// The stagers, as the modules of strandline/torch use them: bytes in, memory out.
//
// Problem: PyTorch's stagers give back Python objects of any shape, whose tensors lie in memory of
// the engine, for as long as anybody holds one of them. The engine knows neither Python nor
// PyTorch.
//
// Approach: which objects a state consists of, and what its copy looks like, is decided in Python
// (strandline/torch/walk.py). What arrives here is a flat list of source tensors with their key
// paths. Each becomes a view of plain bytes, whatever its element type, so that every strided
// tensor can be staged. What goes back is the memory, one DLPack capsule for each extent that the
// engine has laid out, and for each tensor which extent it lies in and where. Python makes a
// storage of each capsule, once, so that what shared a storage shares one again.
//
// Life cycle: a capsule holds the engine's keep-alive of its extent, and passes it on to PyTorch's
// storage; the last storage of a result gives the memory back, on whatever thread. The sources'
// storages are held while they are read, by a Staging until its future has ended: a source tensor
// may get another storage meanwhile.
//
// Concurrency: the engine copies without the GIL (gil.h). A future ends on a thread of a device,
// which must not touch Python: it puts a number into a StagingQueue, where Python's waiter thread
// waits without the GIL.

#include "strandline/stager.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "dlpack.h"
#include "errors.h"
#include "gil.h"
#include "objects.h"
#include "options.h"
#include "strandline/shared_memory.h"

namespace strandline::python {
namespace {

// Where staged tensors lie: capsules of memory, and for each tensor the index of its capsule and
// its first byte there. A tensor that shares no bytes with any other and has none lies nowhere:
// index -1.
struct Staged {
  std::vector<nb::object> memory;
  std::vector<std::int64_t> extents;
  std::vector<std::uint64_t> offsets;
};

// A key path as the engine takes it; lone surrogates become escapes.
std::string path_text(PyObject* path) {
  const nb::object encoded = checked(PyUnicode_AsEncodedString(path, "utf-8", "backslashreplace"));
  return {PyBytes_AS_STRING(encoded.ptr()),
          static_cast<std::size_t>(PyBytes_GET_SIZE(encoded.ptr()))};
}

TensorView view_for_staging(PyObject* tensor, const std::string& path, nb::object& memory) {
  Result<TensorView> view = bytes_view_of(tensor, memory);
  if (view) return std::move(*view);
  Error error = std::move(view.error());
  error.message = "cannot stage '" + path + "', which " + error.message;
  error.key_path = path;
  raise(error);
}

// `memory` becomes what holds the bytes of each.
StateDict state_of(const std::vector<nb::object>& tensors, const std::vector<nb::object>& paths,
                   std::vector<nb::object>& memory) {
  StateDictBuilder builder;
  std::unordered_set<std::string> used;
  memory.resize(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    std::string path = path_text(paths[i].ptr());
    TensorView view = view_for_staging(tensors[i].ptr(), path, memory[i]);
    // Two paths may read the same, such as those of the keys 1 and "1".
    for (int n = 2; !used.insert(path).second; ++n) {
      path = path_text(paths[i].ptr()) + "~" + std::to_string(n);
    }
    unwrap(builder.tensor(Key(std::move(path)), std::move(view)));
  }
  return unwrap(builder.finish());
}

Staged staged_of(const StateDict& state) {
  Staged staged;
  std::unordered_map<const std::byte*, std::int64_t> known;
  staged.extents.reserve(state.tensors().size());
  staged.offsets.reserve(state.tensors().size());
  for (const TensorView& view : state.tensors()) {
    if (view.storage_base == nullptr) {
      staged.extents.push_back(-1);
      staged.offsets.push_back(0);
      continue;
    }
    const auto next = static_cast<std::int64_t>(staged.memory.size());
    const auto [extent, is_new] = known.try_emplace(view.storage_base, next);
    if (is_new) {
      auto* base = const_cast<std::byte*>(view.storage_base);
      staged.memory.push_back(dlpack_capsule(base, view.storage_bytes, view.keep_alive));
    }
    staged.extents.push_back(extent->second);
    staged.offsets.push_back(static_cast<std::uint64_t>(view.data - view.storage_base));
  }
  return staged;
}

// Numbers of stagings that have ended. Copies share it.
class StagingQueue {
 public:
  void push(std::uint64_t number) const {
    const std::lock_guard lock(state_->mutex);
    state_->numbers.push_back(number);
    state_->pushed.notify_one();
  }

  // All numbers that there are, or none after `deadline`.
  [[nodiscard]] std::vector<std::uint64_t> wait(double deadline_s) const {
    const auto deadline = milliseconds_of(deadline_s);
    return without_gil([&] {
      std::unique_lock lock(state_->mutex);
      state_->pushed.wait_for(lock, deadline, [&] { return !state_->numbers.empty(); });
      return std::exchange(state_->numbers, {});
    });
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable pushed;
    std::vector<std::uint64_t> numbers;
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

// A staging that may still run, and what holds the memory that it reads.
class Staging {
 public:
  Staging(Future<StateDict> future, std::vector<nb::object> memory)
      : future_(std::move(future)), memory_(std::move(memory)) {}

  void notify(const StagingQueue& queue, std::uint64_t number) const {
    without_gil([&] { future_.then([queue, number](const auto&) { queue.push(number); }); });
  }

  // Whether it has ended before the deadline.
  [[nodiscard]] bool wait(double deadline_s) const {
    return wait_in_slices(milliseconds_of(deadline_s), [&](std::chrono::milliseconds slice) {
      // What it ended with, or that this slice was too short, is asked below.
      (void)future_.get(slice);
      return future_.ready();
    });
  }

  // Where the tensors lie, or the error raised. REQUIRES: it has ended.
  [[nodiscard]] Staged result() {
    memory_.clear();
    return staged_of(
        unwrap(without_gil([&] { return future_.get(std::chrono::milliseconds(0)); })));
  }

 private:
  Future<StateDict> future_;
  std::vector<nb::object> memory_;
};

StateDictStager::Options stager_options(bool pin_memory, bool share_memory,
                                        std::optional<std::uint64_t> host_bytes_max,
                                        std::optional<std::uint32_t> copy_threads) {
  StateDictStager::Options options;
  options.pin_memory = pin_memory;
  options.share_memory = share_memory;
  options.host_bytes_max = host_bytes_max;
  options.copy_threads = copy_threads;
  return options;
}

Staged stage_now(StateDictStager& stager, const std::vector<nb::object>& tensors,
                 const std::vector<nb::object>& paths) {
  std::vector<nb::object> memory;
  const StateDict state = state_of(tensors, paths, memory);
  return staged_of(unwrap(without_gil([&] { return stager.stage(state); })));
}

Staging begin_staging(DefaultStager& stager, const std::vector<nb::object>& tensors,
                      const std::vector<nb::object>& paths) {
  std::vector<nb::object> memory;
  const StateDict state = state_of(tensors, paths, memory);
  Future<StateDict> future = unwrap(without_gil([&] { return stager.stage(state); }));
  return {std::move(future), std::move(memory)};
}

void bind_state_dict_stager(nb::module_& module) {
  nb::class_<StateDictStager>(module, "StateDictStager", "Copies bytes; done on return.")
      .def(
          "__init__",
          [](StateDictStager* self, bool pin_memory, bool share_memory,
             std::optional<std::uint64_t> host_bytes_max,
             std::optional<std::uint32_t> copy_threads) {
            new (self) StateDictStager(unwrap(StateDictStager::open(
                stager_options(pin_memory, share_memory, host_bytes_max, copy_threads))));
          },
          nb::arg("pin_memory"), nb::arg("share_memory"), nb::arg("host_bytes_max").none(),
          nb::arg("copy_threads").none())
      .def("stage", &stage_now, nb::arg("tensors"), nb::arg("paths"),
           "Copies the storages of tensors, as far as these reach.")
      .def(
          "close", [](StateDictStager& stager) { without_gil([&] { stager.close(); }); },
          "Ends it; what it has staged stays.")
      .def_prop_ro("host_bytes_in_use", &StateDictStager::host_bytes_in_use)
      .def_prop_ro("host_bytes_mapped", &StateDictStager::host_bytes_mapped);
}

void bind_default_stager(nb::module_& module) {
  nb::class_<DefaultStager>(module, "DefaultStager", "Copies bytes; devices may go on.")
      .def(
          "__init__",
          [](DefaultStager* self, bool pin_memory, bool share_memory,
             std::optional<std::uint64_t> host_bytes_max,
             std::optional<std::uint32_t> copy_threads) {
            CheckpointStagerConfig config;
            config.use_pinned_memory = pin_memory;
            config.use_shared_memory = share_memory;
            config.use_async_staging = true;
            config.use_non_blocking_copy = false;
            config.host_bytes_max = host_bytes_max;
            config.copy_threads = copy_threads;
            new (self) DefaultStager(unwrap(DefaultStager::open(config)));
          },
          nb::arg("pin_memory"), nb::arg("share_memory"), nb::arg("host_bytes_max").none(),
          nb::arg("copy_threads").none())
      .def("stage", &begin_staging, nb::arg("tensors"), nb::arg("paths"),
           "Begins to copy the storages of tensors; those in host memory are copied on return.")
      .def(
          "close",
          [](DefaultStager& stager) { unwrap(without_gil([&] { return stager.close(); })); },
          "Waits for devices and ends it; what it has staged stays.");
}

}  // namespace

void bind_stager(nb::module_& module) {
  nb::class_<Staged>(module, "Staged", "Where staged tensors lie.")
      .def_ro("memory", &Staged::memory, "A DLPack capsule of bytes for each extent.")
      .def_ro("extents", &Staged::extents, "By tensor: its extent, or -1 where it has no bytes.")
      .def_ro("offsets", &Staged::offsets, "By tensor: its first byte in the extent.");
  nb::class_<StagingQueue>(module, "StagingQueue", "Tells which stagings have ended.")
      .def(nb::init<>())
      .def("wait", &StagingQueue::wait, nb::arg("deadline_s"),
           "Numbers of stagings that have ended, at least one unless the deadline passes.");
  nb::class_<Staging>(module, "Staging", "A staging that may still run.")
      .def("notify", &Staging::notify, nb::arg("queue"), nb::arg("number"),
           "Has the number put into the queue when it has ended.")
      .def("wait", &Staging::wait, nb::arg("deadline_s"), "Whether it ended before the deadline.")
      .def("result", &Staging::result, "What was staged, or its error raised; once it has ended.");
  bind_state_dict_stager(module);
  bind_default_stager(module);
  module.def(
      "share",
      [](std::uintptr_t address, std::uint64_t bytes) {
        const SharedRange range = unwrap(share(reinterpret_cast<const std::byte*>(address), bytes));
        return nb::make_tuple(range.pid, range.descriptor, range.slab, range.generation,
                              range.offset, range.bytes);
      },
      nb::arg("address"), nb::arg("bytes"),
      nb::sig("def share(address: int, bytes: int) -> tuple[int, int, str, int, int, int]"),
      "What attach() in another process needs to map this range of shared staged memory.");
  module.def(
      "attach",
      [](std::int64_t pid, int descriptor, std::string slab, std::uint64_t generation,
         std::uint64_t offset, std::uint64_t bytes) {
        const SharedRange range{pid, descriptor, std::move(slab), generation, offset, bytes};
        AttachedMemory memory = unwrap(without_gil([&] { return attach(range); }));
        return dlpack_capsule(memory.data, memory.bytes, std::move(memory.keep_alive));
      },
      nb::arg("pid"), nb::arg("descriptor"), nb::arg("slab"), nb::arg("generation"),
      nb::arg("offset"), nb::arg("bytes"), "A DLPack capsule of the range's bytes.");
}

}  // namespace strandline::python
