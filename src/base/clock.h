// Time as the engine sees it, so that tests can hold it still.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace strandline::base {

class Clock {
 public:
  using Instant = std::chrono::steady_clock::time_point;

  virtual ~Clock() = default;
  [[nodiscard]] virtual Instant now() const = 0;
  // Unix time in nanoseconds.
  [[nodiscard]] virtual std::int64_t unix_ns() const = 0;
};

class SystemClock final : public Clock {
 public:
  [[nodiscard]] Instant now() const override { return std::chrono::steady_clock::now(); }
  [[nodiscard]] std::int64_t unix_ns() const override {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::system_clock::now().time_since_epoch())
        .count();
  }
};

// `wait`, or a year where that is shorter: sums with it do not overflow.
[[nodiscard]] inline std::chrono::milliseconds at_most_a_year(std::chrono::milliseconds wait) {
  constexpr std::chrono::hours kYear(24 * 365);
  return std::min<std::chrono::milliseconds>(wait, kYear);
}

// `now` plus `wait`, without overflowing for absurdly long waits.
[[nodiscard]] inline Clock::Instant deadline_after(Clock::Instant now,
                                                   std::chrono::milliseconds wait) {
  return now + at_most_a_year(wait);
}

[[nodiscard]] inline double milliseconds_between(Clock::Instant from, Clock::Instant to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

}  // namespace strandline::base
