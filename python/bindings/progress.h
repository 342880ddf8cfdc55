/// @file
/// What Python does while the engine works: signals, and the user's progress function.
#pragma once

#include <nanobind/nanobind.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <utility>

#include "gil.h"
#include "strandline/checkpoint.h"

namespace strandline::python {

namespace nb = nanobind;

/// Signals, while a save waits: a SaveOptions::interrupted that keeps what a handler raised. Must
/// be destroyed with the GIL.
class SignalWatch {
 public:
  /// The callback for the engine; `*this` must outlive its calls.
  [[nodiscard]] std::function<bool()> callback() {
    return [this] { return interrupted(); };
  }

  /// Raises what a handler raised, if one did.
  void raise_pending() {
    if (pending_) throw std::exchange(pending_, std::nullopt).value();
  }

 private:
  bool interrupted() {
    const nb::gil_scoped_acquire gil;
    if (pending_) return true;
    try {
      check_signals();
    } catch (nb::python_error& error) {
      pending_.emplace(std::move(error));
    }
    return pending_.has_value();
  }

  std::optional<nb::python_error> pending_;  // Used with the GIL only.
};

/// A ProgressCallback that checks signals and calls `function(done, total)` now and then, both with
/// the GIL. The first exception stops the engine and waits to be raised. Must be destroyed with the
/// GIL.
class PythonProgress {
 public:
  explicit PythonProgress(nb::object function) : function_(std::move(function)) {}

  /// The callback for the engine; `*this` must outlive its calls.
  [[nodiscard]] ProgressCallback callback() {
    return [this](std::uint64_t done, std::uint64_t total) { return advance(done, total); };
  }

  /// Raises what Python raised in the callback, if it did.
  void raise_pending() {
    if (pending_) throw std::exchange(pending_, std::nullopt).value();
  }

 private:
  using Clock = std::chrono::steady_clock;

  bool advance(std::uint64_t done, std::uint64_t total) {
    {
      const std::lock_guard lock(mutex_);
      const auto now = Clock::now();
      if (done < total && now < next_) return true;
      next_ = now + kSignalSlice;
    }
    const nb::gil_scoped_acquire gil;
    if (pending_) return false;
    try {
      check_signals();
      if (!function_.is_none()) function_(done, total);
      return true;
    } catch (nb::python_error& error) {
      pending_.emplace(std::move(error));
      return false;
    }
  }

  nb::object function_;                      // Used with the GIL only.
  std::optional<nb::python_error> pending_;  // Used with the GIL only.
  std::mutex mutex_;
  Clock::time_point next_{};  // Guarded by mutex_.
};

}  // namespace strandline::python
