#include "device/registry.h"

#include <algorithm>
#include <utility>

#include "device/host_device.h"

namespace strandline::device {

Registry::Registry() { add(std::make_shared<HostDevice>()); }

void Registry::add(std::shared_ptr<Device> device) {
  const auto same = std::find_if(devices_.begin(), devices_.end(), [&](const auto& known) {
    return known->kind() == device->kind();
  });
  if (same == devices_.end()) {
    devices_.push_back(std::move(device));
  } else {
    *same = std::move(device);
  }
}

Device* Registry::find(std::string_view kind) const {
  for (const auto& device : devices_) {
    if (device->kind() == kind) return device.get();
  }
  return nullptr;
}

}  // namespace strandline::device
