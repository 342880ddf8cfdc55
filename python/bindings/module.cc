// The extension module strandline._core: what the Python package needs of the engine. Users see the
// classes and functions of strandline, which add warnings, progress and what else is Python's.

#include <nanobind/nanobind.h>

#include "bindings.h"
#include "strandline/version.h"

namespace nb = nanobind;

NB_MODULE(_core, module) {
  // State of the engine belongs to the process, and so do signals and exit handlers.
  if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
    throw nb::import_error(
        "strandline works in the main interpreter only: import it there, and pass it what a "
        "subinterpreter wants to save");
  }
  module.doc() = "The engine of Strandline; use the package strandline instead.";
  module.def(
      "version", [] { return strandline::kVersion; }, "The engine's version.");
  strandline::python::bind_save(module);
  strandline::python::bind_checkpointer(module);
  strandline::python::bind_functions(module);
  strandline::python::bind_stager(module);
}
