#include "strandline/future.h"

#include <algorithm>
#include <utility>

#include "base/clock.h"
#include "staging/future_state.h"

namespace strandline::inline v0 {
namespace {

Error forked() {
  return Error{.code = ErrorCode::kUnavailable,
               .message =
                   "this future belongs to the process that forked, and had not ended then: "
                   "wait for it there, or before the fork"};
}

}  // namespace

template <typename T>
Future<T> Future<T>::State::handle(std::shared_ptr<State> state) {
  State* const raw = state.get();
  return Future(std::shared_ptr<State>(
      raw, [state = std::move(state)](const State*) { state->drop_result(); }));
}

template <typename T>
void Future<T>::State::end(Result<T> result) {
  auto ended = std::make_shared<const Result<T>>(std::move(result));
  std::vector<Callback> callbacks;
  {
    base::MutexLock lock(mutex_);
    if (has_handles_) result_ = ended;
    ended_.store(true, std::memory_order_release);
    callbacks.swap(callbacks_);
    if (callbacks.empty()) ended.reset();  // From here on it is the handles' alone.
    changed_.notify_all();
  }
  for (const Callback& callback : callbacks) callback(*ended);
}

template <typename T>
void Future<T>::State::drop_result() {
  if (base::fork_generation() != fork_generation_) return;  // The lock may be held for ever.
  std::shared_ptr<const Result<T>> dropped;
  base::MutexLock lock(mutex_);
  has_handles_ = false;
  dropped.swap(result_);
}

template <typename T>
Result<T> Future<T>::State::get(std::chrono::milliseconds deadline) const {
  if (ended()) return *result_;
  if (base::fork_generation() != fork_generation_) return failure(forked());
  const auto until = base::deadline_after(std::chrono::steady_clock::now(),
                                          std::max(deadline, std::chrono::milliseconds(0)));
  base::MutexLock lock(mutex_);
  while (!ended()) {
    if (std::chrono::steady_clock::now() >= until) {
      return failure(ErrorCode::kTimeout,
                     "the staging had not ended at the deadline, and goes on: wait longer");
    }
    changed_.wait_until(mutex_, until);
  }
  return *result_;
}

template <typename T>
void Future<T>::State::then(Callback callback) {
  if (!ended()) {
    if (base::fork_generation() != fork_generation_) return callback(failure(forked()));
    base::MutexLock lock(mutex_);
    if (!ended()) {
      callbacks_.push_back(std::move(callback));
      return;
    }
  }
  callback(*result_);
}

template <typename T>
Future<T>::Future(Result<T> result) : state_(std::make_shared<State>()) {
  state_->end(std::move(result));
}

template <typename T>
Future<T>::Future(std::shared_ptr<State> state) : state_(std::move(state)) {}

template <typename T>
bool Future<T>::ready() const {
  return state_->ended();
}

template <typename T>
Result<T> Future<T>::get(std::chrono::milliseconds deadline) const {
  return state_->get(deadline);
}

template <typename T>
void Future<T>::then(std::function<void(const Result<T>&)> callback) const {
  state_->then(std::move(callback));
}

template class Future<StateDict>;

}  // namespace strandline::inline v0
