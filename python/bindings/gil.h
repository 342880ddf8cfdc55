/// @file
/// The GIL contract of the bindings.
///
/// Three kinds of code meet here, and each has one rule:
///
/// 1. *Collecting and rebuilding* walk Python objects. They run with the GIL, on the thread that
///    called into Strandline, and finish before the engine is called or begin after it returned.
/// 2. *Engine calls that block* (save, restore, load, waits, close) run inside `without_gil`. They
///    see only StateDicts, whose views borrow memory from Python objects. The binding holds strong
///    references to all of these objects in a local variable *outside* `without_gil`, so that they
///    outlive the call and are dropped by the thread that took them, with the GIL. A view's
///    `keep_alive` is never a Python reference: the last copy of a view may die on an engine
///    thread.
/// 3. *Callbacks* (Allocator, ProgressCallback, SaveOptions::interrupted) come from the engine on
///    the calling thread. They take the GIL, catch every Python exception, keep it, and make the
///    engine stop; the binding raises the kept exception after the engine has returned. No
///    exception crosses the engine.
///
/// Engine threads never touch Python. Signals: Python runs signal handlers only on its main thread
/// and only when asked. So no call leaves them unnoticed for longer than `kSignalSlice`:
///
/// - Waits are cut into slices, between which `check_signals` raises KeyboardInterrupt where Ctrl-C
///   was pressed.
/// - load() and restore() ask from their ProgressCallback.
/// - save() asks from `interrupted`, while it waits for earlier saves, for staging memory, for a
///   device, or for durability. Not while it copies: no Python runs then, so that nothing changes
///   the state under the copy. A handler that raises ends the save, which saves nothing. A handler
///   that calls save() or a wait of the same Checkpointer gets an UnavailableError, since that save
///   cannot go on before the handler returns.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <chrono>
#include <utility>

namespace strandline::python {

namespace nb = nanobind;

/// How long a wait may leave signals unnoticed: short for a person, long for a processor.
inline constexpr std::chrono::milliseconds kSignalSlice{100};

/// Runs `call` without the GIL and returns what it returns. Neither `call` nor its result may own a
/// Python reference.
template <typename Call>
auto without_gil(Call&& call) {
  nb::gil_scoped_release released;
  return std::forward<Call>(call)();
}

/// Raises what a signal handler raised, such as KeyboardInterrupt.
inline void check_signals() {
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

/// Calls `wait(slice)` without the GIL until it returns true or `deadline` has passed, checking
/// signals in between. Returns whether `wait` returned true.
template <typename Wait>
bool wait_in_slices(std::chrono::milliseconds deadline, Wait&& wait) {
  using Clock = std::chrono::steady_clock;
  // A deadline beyond a century is "never"; adding it to now could overflow.
  constexpr std::chrono::milliseconds kNever = std::chrono::hours(24 * 36'500);
  const auto end = Clock::now() + std::min(deadline, kNever);
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now());
    const auto slice = std::clamp(left, std::chrono::milliseconds(0), kSignalSlice);
    if (without_gil([&] { return wait(slice); })) return true;
    check_signals();
    if (Clock::now() >= end) return false;
  }
}

}  // namespace strandline::python
