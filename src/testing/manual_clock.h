// A clock that moves when the test says so.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "base/clock.h"

namespace strandline::testing {

// Begins at the real time, because waits on condition variables compare deadlines with it; then
// stands still. Thread-safety: thread-safe.
class ManualClock final : public base::Clock {
 public:
  [[nodiscard]] Instant now() const override {
    return start_ + std::chrono::nanoseconds(advanced_ns_.load());
  }
  [[nodiscard]] std::int64_t unix_ns() const override {
    constexpr std::int64_t kStartUnixNs = 1'700'000'000'000'000'000;
    return kStartUnixNs + advanced_ns_.load();
  }
  void advance(std::chrono::nanoseconds by) { advanced_ns_.fetch_add(by.count()); }

 private:
  const Instant start_ = std::chrono::steady_clock::now();
  std::atomic<std::int64_t> advanced_ns_{0};
};

}  // namespace strandline::testing
