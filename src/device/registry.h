// Finds the Device of a tensor.
#pragma once

#include <memory>
#include <vector>

#include "strandline/device.h"

namespace strandline::device {

// Thread-safety: thread-compatible; constant once the engine runs.
class Registry {
 public:
  // Knows the host device.
  Registry();
  // Adds a device; a later one of the same kind takes its place.
  void add(std::shared_ptr<Device> device);
  // The device of a kind, or null.
  [[nodiscard]] Device* find(std::string_view kind) const;
  // Whether it knows any besides the host.
  [[nodiscard]] bool knows_devices() const { return devices_.size() > 1; }

 private:
  std::vector<std::shared_ptr<Device>> devices_;
};

}  // namespace strandline::device
