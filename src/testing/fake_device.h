// A device whose copies finish when the test says so.
//
// Fault model. A copy moves its bytes when the test completes it, not before: memory that was freed
// or handed to somebody else in between is read or overwritten then, as a real device would. Copies
// complete in any order, on the thread that completes them. A failing copy may have moved part of
// its bytes: it leaves rubbish in the first half of the destination. Every completion is called
// exactly once; those still outstanding when the device ends fail with kUnavailable.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>

#include "base/clock.h"
#include "base/mutex.h"
#include "strandline/device.h"

namespace strandline::testing {

// Its "device memory" is host memory under DeviceId{"fake"}. Thread-safety: thread-safe.
class FakeDevice final : public Device {
 public:
  FakeDevice() = default;
  ~FakeDevice() override;
  FakeDevice(const FakeDevice&) = delete;
  FakeDevice& operator=(const FakeDevice&) = delete;

  [[nodiscard]] std::string_view kind() const override { return "fake"; }
  void copy_to_host_async(const TensorView& source, std::uint64_t first_byte,
                          std::span<std::byte> host, Completion done) override;
  void copy_from_host_async(std::span<const std::byte> host, const TensorView& destination,
                            std::uint64_t first_byte, Completion done) override;

  // Waits until at least `count` copies are outstanding; false at the deadline.
  bool wait_for_pending(std::size_t count, base::Clock::Instant deadline)
      STRANDLINE_EXCLUDES(mutex_);
  [[nodiscard]] std::size_t pending() const STRANDLINE_EXCLUDES(mutex_);

  // Each ends one outstanding copy; false if there is none.
  bool complete_oldest() STRANDLINE_EXCLUDES(mutex_);
  bool complete_newest() STRANDLINE_EXCLUDES(mutex_);
  bool fail_oldest(Error error) STRANDLINE_EXCLUDES(mutex_);
  // Ends all that are outstanding and returns how many.
  std::size_t complete_all() STRANDLINE_EXCLUDES(mutex_);

  // From now on copies complete before they return, as the host device's do; or no longer.
  void set_immediate(bool immediate) STRANDLINE_EXCLUDES(mutex_);

 private:
  struct Copy {
    TensorView view;
    std::uint64_t first_byte = 0;
    std::span<std::byte> host;
    bool to_host = true;
    Completion done;
  };

  void start(Copy copy) STRANDLINE_EXCLUDES(mutex_);
  bool take(bool oldest, Copy& copy) STRANDLINE_EXCLUDES(mutex_);
  static void complete(Copy copy);

  mutable base::Mutex mutex_;
  base::ConditionVariable changed_;
  std::deque<Copy> pending_ STRANDLINE_GUARDED_BY(mutex_);
  bool immediate_ STRANDLINE_GUARDED_BY(mutex_) = false;
};

}  // namespace strandline::testing
