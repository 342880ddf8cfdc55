// The device that is always there: the host's own memory. Copies complete before they return.
#pragma once

#include "strandline/device.h"

namespace strandline::device {

// Copies any strided view, in either direction, with its conjugate and negative bits resolved.
//
// Fails with kInvalidArgument where the range is not inside the tensor, or a destination is not
// writable or shows one element twice; with kUnsupported for a packed type that is not row-major
// and for a negative view of a type without a sign. A failed copy has moved nothing.
// Thread-safety: thread-safe, no state.
class HostDevice final : public Device {
 public:
  [[nodiscard]] std::string_view kind() const override { return "host"; }
  void copy_to_host_async(const TensorView& source, std::uint64_t first_byte,
                          std::span<std::byte> host, Completion done) override;
  void copy_from_host_async(std::span<const std::byte> host, const TensorView& destination,
                            std::uint64_t first_byte, Completion done) override;
};

}  // namespace strandline::device
