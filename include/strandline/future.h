/// @file
/// The result of an operation that may end later.
#pragma once

#include <chrono>
#include <functional>
#include <memory>

#include "strandline/error.h"
#include "strandline/export.h"
#include "strandline/state_dict.h"

namespace strandline::inline v0 {

/// A value, or an error, that is there now or later. Copies share it; the last one's end drops it.
///
/// Thread-safety: thread-safe. Only `Future<StateDict>` exists. In a forked child a future that had
/// not ended before the fork never will: there it fails with kUnavailable.
template <typename T>
class STRANDLINE_EXPORT Future {
 public:
  /// A future that has ended already.
  explicit Future(Result<T> result);

  /// Whether it has ended. Does not block.
  [[nodiscard]] bool ready() const;

  /// The value, or what the operation failed with. Blocks at most `deadline`; then kTimeout, and
  /// the operation goes on.
  [[nodiscard]] Result<T> get(std::chrono::milliseconds deadline) const;

  /// Calls `callback` once when it has ended: at once and on this thread if it has, otherwise on
  /// the thread that ends it, which is a device's or the engine's. It must not block or throw. It
  /// is called even if no copy of the future is left.
  void then(std::function<void(const Result<T>&)> callback) const;

  struct State;                                   // Internal.
  explicit Future(std::shared_ptr<State> state);  // Internal.

 private:
  std::shared_ptr<State> state_;
};

}  // namespace strandline::inline v0
