// The handle of one save. Waits are cut into slices (gil.h), so that Ctrl-C works.

#include "strandline/save.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <optional>
#include <string>
#include <utility>

#include "bindings.h"
#include "errors.h"
#include "gil.h"
#include "options.h"

namespace strandline::python {
namespace {

const char* outcome_name(Outcome::Kind kind) {
  switch (kind) {
    case Outcome::Kind::kCommitted:
      return "committed";
    case Outcome::Kind::kFailed:
      return "failed";
    case Outcome::Kind::kSkipped:
      return "skipped";
  }
  return "failed";
}

// (name, cause or None), or None while the save runs.
using NamedOutcome = std::optional<std::pair<std::string, nb::object>>;

NamedOutcome outcome_of(const Save& save) {
  const std::optional<Outcome> outcome = save.outcome();
  if (!outcome) return std::nullopt;
  nb::object cause = outcome->cause ? exception_of(*outcome->cause) : nb::none();
  return std::pair(std::string(outcome_name(outcome->kind)), std::move(cause));
}

// Waits with `wait(slice)`, which gives a Result. A timeout of one slice is told from a save that
// itself failed with a timeout by its outcome. The save may have ended after the slice and before
// the outcome was looked at: once there is an outcome, what a wait gives is the save's. Returns
// whether the wait ended before `deadline_s`.
template <typename Wait>
bool wait_for(const Save& save, double deadline_s, Wait wait) {
  Status ended;
  const bool in_time = wait_in_slices(milliseconds_of(deadline_s), [&](auto slice) {
    auto result = wait(slice);
    if (!result && result.error().code == ErrorCode::kTimeout) {
      if (!save.outcome()) return false;
      result = wait(std::chrono::milliseconds(0));
    }
    if (result) return true;
    ended = failure(std::move(result.error()));
    return true;
  });
  unwrap(std::move(ended));
  return in_time;
}

}  // namespace

void bind_save(nb::module_& module) {
  nb::class_<Progress>(module, "Progress", "How far a save has come, in bytes of tensors.")
      .def_ro("bytes_total", &Progress::bytes_total)
      .def_ro("bytes_staged", &Progress::bytes_staged, "Copied out of the training job's memory.")
      .def_ro("bytes_written", &Progress::bytes_written, "Handed to the storage.")
      .def_ro("ended", &Progress::ended, "Whether there is an outcome.")
      .def("__repr__", [](const Progress& progress) {
        return nb::str("Progress(bytes_total={}, bytes_staged={}, bytes_written={}, ended={})")
            .format(progress.bytes_total, progress.bytes_staged, progress.bytes_written,
                    progress.ended);
      });
  nb::class_<Timings>(module, "Timings", "Where the time of a save went, in milliseconds.")
      .def_ro("collect_ms", &Timings::collect_ms, "Walking the state.")
      .def_ro("prepare_ms", &Timings::prepare_ms,
              "Waiting for another thread's save(), and looking at the directory.")
      .def_ro("plan_ms", &Timings::plan_ms, "Laying out files.")
      .def_ro("wait_ms", &Timings::wait_ms, "Waiting for staging memory.")
      .def_ro("copy_ms", &Timings::copy_ms, "Copying and digesting.")
      .def_ro("write_ms", &Timings::write_ms, "Writing the staged bytes, in the background.")
      .def_ro("commit_ms", &Timings::commit_ms, "Manifest, syncs, publishing, verifying.")
      .def_ro("blocked_ms", &Timings::blocked_ms, "From the call to its return.")
      .def_ro("durable_ms", &Timings::durable_ms, "From the call to committed; 0 until then.")
      .def("__repr__", [](const Timings& timings) {
        return nb::str(
                   "Timings(collect_ms={:.3f}, prepare_ms={:.3f}, plan_ms={:.3f}, wait_ms={:.3f}, "
                   "copy_ms={:.3f}, "
                   "write_ms={:.3f}, commit_ms={:.3f}, blocked_ms={:.3f}, durable_ms={:.3f})")
            .format(timings.collect_ms, timings.prepare_ms, timings.plan_ms, timings.wait_ms,
                    timings.copy_ms, timings.write_ms, timings.commit_ms, timings.blocked_ms,
                    timings.durable_ms);
      });
  nb::class_<Save>(module, "Save", "The engine's handle of one save.")
      .def_prop_ro("step", &Save::step)
      .def(
          "wait_staged",
          [](const Save& save, double deadline_s) {
            return wait_for(save, deadline_s, [&](auto slice) { return save.wait_staged(slice); });
          },
          nb::arg("deadline_s"),
          "Whether the state was staged before the deadline; raises the save's error.")
      .def(
          "wait_durable",
          [](const Save& save, double deadline_s) {
            return wait_for(save, deadline_s, [&](auto slice) { return save.wait_durable(slice); });
          },
          nb::arg("deadline_s"),
          "Whether there was an outcome before the deadline; raises the save's error.")
      .def("outcome", &outcome_of, "(name, cause or None), or None while the save runs.")
      .def("progress", &Save::progress)
      .def("timings", &Save::timings)
      .def("warnings", &Save::warnings)
      .def("cancel", &Save::cancel)
      .def("summary", &Save::summary);
}

}  // namespace strandline::python
