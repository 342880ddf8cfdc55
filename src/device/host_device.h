// The device that is always there: the host's own memory. Copies complete before they return.
#pragma once

#include "strandline/device.h"

namespace strandline::device {

class HostDevice final : public Device {
 public:
  [[nodiscard]] std::string_view kind() const override { return "host"; }
  void copy_to_host_async(const TensorView& source, std::uint64_t first_byte,
                          std::span<std::byte> host, Completion done) override;
  void copy_from_host_async(std::span<const std::byte> host, const TensorView& destination,
                            std::uint64_t first_byte, Completion done) override;
};

}  // namespace strandline::device
