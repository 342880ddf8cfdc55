/// @file
/// The parts of the extension module, one function a file.
#pragma once

#include <nanobind/nanobind.h>

namespace strandline::python {

/// Save, its Progress and its Timings.
void bind_save(nanobind::module_& module);

/// Checkpointer.
void bind_checkpointer(nanobind::module_& module);

/// The functions save() and load().
void bind_functions(nanobind::module_& module);

/// The stagers, and the sharing of what they stage.
void bind_stager(nanobind::module_& module);

}  // namespace strandline::python
