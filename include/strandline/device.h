/// @file
/// The interface to memory that tensors live in: the host, and devices that copy by themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string_view>

#include "strandline/error.h"
#include "strandline/export.h"
#include "strandline/state_dict.h"

namespace strandline::inline v0 {

/// Called exactly once, when an operation has ended; from any thread, possibly before the call
/// that started the operation returns. It must not block or throw.
using Completion = std::function<void(Status)>;

/// Moves a tensor's elements between its own memory and host memory.
///
/// Both calls name a range of the tensor's bytes *in row-major order* (strides, expansion and the
/// conjugate and negative bits resolved): [first_byte, first_byte + host.size()).
///
/// Thread-safety: thread-safe. Ownership: both memories must stay valid until the completion; the
/// TensorView itself only until the call returns.
/// Blocking: the host device completes before it returns; others return at once.
class STRANDLINE_EXPORT Device {
 public:
  virtual ~Device() = default;

  /// The kind that DeviceId::kind names, such as "host" or "cuda".
  [[nodiscard]] virtual std::string_view kind() const = 0;

  /// Copies a range of `source` into host memory.
  virtual void copy_to_host_async(const TensorView& source, std::uint64_t first_byte,
                                  std::span<std::byte> host, Completion done) = 0;

  /// Copies host memory into a range of `destination`.
  virtual void copy_from_host_async(std::span<const std::byte> host, const TensorView& destination,
                                    std::uint64_t first_byte, Completion done) = 0;
};

}  // namespace strandline::inline v0
