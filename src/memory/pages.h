// Where the memory of an arena comes from: private pages, or pages that other processes can map.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>

#include "strandline/error.h"

namespace strandline::memory {

// Ranges begin at a multiple of this and take whole multiples of it: pages, and the unit of direct
// I/O.
inline constexpr std::uint64_t kPageBytes = 4096;

// All sizes are multiples of kPageBytes. Thread-safety: none, but back() may run beside other
// calls; the arena's lock guards the rest. Only back() may take long.
class Pages {
 public:
  virtual ~Pages() = default;

  // Addresses of `bytes` bytes, to be used after back(). Fails with kMemoryLimit.
  [[nodiscard]] virtual Result<std::byte*> map(std::uint64_t bytes) = 0;

  // Makes what map() gave usable. Fails with kMemoryLimit where the kernel has no memory for it;
  // then it is only good for unmap().
  [[nodiscard]] virtual Status back(std::byte* data, std::uint64_t bytes) = 0;

  // Gives any pages back to the kernel, whichever calls of map() they came from.
  virtual void unmap(std::byte* data, std::uint64_t bytes) = 0;

  // How many more ranges may be open at once.
  [[nodiscard]] virtual std::size_t places_free() const {
    return std::numeric_limits<std::size_t>::max();
  }

  // A range becomes a lease. REQUIRES: places_free() > 0.
  virtual void open(std::byte* data, std::uint64_t bytes) = 0;

  // Nobody in this process holds the lease any more. False if another process still does: then the
  // range must be left alone, stays open, and is asked about again later.
  [[nodiscard]] virtual bool close(std::byte* data) = 0;

  // Undoes open(): nobody was told of the range.
  virtual void cancel(std::byte* data) = 0;
};

// Memory of this process alone. A forked child has its own copy of it where `inherited`, and
// nothing otherwise.
[[nodiscard]] std::unique_ptr<Pages> make_private_pages(bool inherited);

// The error of a map() or back() that the kernel refused.
[[nodiscard]] Error cannot_map(std::uint64_t bytes, int error);

}  // namespace strandline::memory
