#include "testing/fake_device.h"

#include <algorithm>
#include <utility>

#include "device/host_device.h"

namespace strandline::testing {

FakeDevice::~FakeDevice() {
  Copy copy;
  while (take(true, copy)) {
    copy.done(failure(ErrorCode::kUnavailable, "the fake device has ended"));
  }
}

void FakeDevice::copy_to_host_async(const TensorView& source, std::uint64_t first_byte,
                                    std::span<std::byte> host, Completion done) {
  start({.view = source,
         .first_byte = first_byte,
         .host = host,
         .to_host = true,
         .done = std::move(done)});
}

void FakeDevice::copy_from_host_async(std::span<const std::byte> host,
                                      const TensorView& destination, std::uint64_t first_byte,
                                      Completion done) {
  start({.view = destination,
         .first_byte = first_byte,
         .host = {const_cast<std::byte*>(host.data()), host.size()},
         .to_host = false,
         .done = std::move(done)});
}

bool FakeDevice::wait_for_pending(std::size_t count, base::Clock::Instant deadline) {
  base::MutexLock lock(mutex_);
  while (pending_.size() < count) {
    if (!changed_.wait_until(mutex_, deadline)) return pending_.size() >= count;
  }
  return true;
}

std::size_t FakeDevice::pending() const {
  base::MutexLock lock(mutex_);
  return pending_.size();
}

bool FakeDevice::complete_oldest() {
  Copy copy;
  if (!take(true, copy)) return false;
  complete(std::move(copy));
  return true;
}

bool FakeDevice::complete_newest() {
  Copy copy;
  if (!take(false, copy)) return false;
  complete(std::move(copy));
  return true;
}

bool FakeDevice::fail_oldest(Error error) {
  Copy copy;
  if (!take(true, copy)) return false;
  if (copy.to_host) {
    const auto half = copy.host.first(copy.host.size() / 2);
    std::fill(half.begin(), half.end(), std::byte{0xbd});
  }
  copy.done(failure(std::move(error)));
  return true;
}

std::size_t FakeDevice::complete_all() {
  std::size_t count = 0;
  while (complete_oldest()) ++count;
  return count;
}

void FakeDevice::set_immediate(bool immediate) {
  base::MutexLock lock(mutex_);
  immediate_ = immediate;
}

void FakeDevice::start(Copy copy) {
  // Whoever starts a copy keeps the tensor alive, not the device.
  copy.view.keep_alive.reset();
  {
    base::MutexLock lock(mutex_);
    if (!immediate_) {
      pending_.push_back(std::move(copy));
      changed_.notify_all();
      return;
    }
  }
  complete(std::move(copy));
}

bool FakeDevice::take(bool oldest, Copy& copy) {
  base::MutexLock lock(mutex_);
  if (pending_.empty()) return false;
  if (oldest) {
    copy = std::move(pending_.front());
    pending_.pop_front();
  } else {
    copy = std::move(pending_.back());
    pending_.pop_back();
  }
  return true;
}

void FakeDevice::complete(Copy copy) {
  device::HostDevice host;
  if (copy.to_host) {
    host.copy_to_host_async(copy.view, copy.first_byte, copy.host, std::move(copy.done));
  } else {
    host.copy_from_host_async(copy.host, copy.view, copy.first_byte, std::move(copy.done));
  }
}

}  // namespace strandline::testing
