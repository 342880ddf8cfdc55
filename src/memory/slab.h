// The host memory that snapshots are taken into, under a hard ceiling.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/wait.h"
#include "memory/host_memory.h"
#include "memory/pages.h"
#include "strandline/error.h"

namespace strandline::memory {

class Arena;        // The slab's own state, shared by its leases; in arena.h.
class LeasedRange;  // Likewise.

// A page-aligned range of a Slab. Copies share it; the last holder's end gives it back. It stays
// valid even if the Slab is gone. Thread-safety: like shared_ptr.
class Lease {
 public:
  Lease() = default;
  [[nodiscard]] std::byte* data() const;      // Null for a lease of no bytes.
  [[nodiscard]] std::uint64_t bytes() const;  // What was asked for.
  explicit operator bool() const { return range_ != nullptr; }

 private:
  friend class Slab;
  std::shared_ptr<const LeasedRange> range_;
};

// What adapt() raises the ceiling to where none was given; never above half of what was free then.
enum class DefaultCeiling : std::uint8_t {
  kTwoGenerations,  // Two generations of the largest state seen: one is written, one is copied.
  kHalfOfFree,      // All of that half: how many generations are held is the user's affair.
};

// Hands out leases that never overlap. Thread-safety: thread-safe.
class Slab {
 public:
  struct Options {
    // The ceiling of mapped bytes. Not given: raised as states grow, as `default_ceiling` says.
    std::optional<std::uint64_t> host_bytes_max = {};
    DefaultCeiling default_ceiling = DefaultCeiling::kTwoGenerations;
    // Other processes can map the leases (see shared_memory.h).
    bool shared = false;
    // Of private memory: forked children have their own copy of the leases. Otherwise they have
    // nothing there, and forking costs nothing.
    bool inherited = false;
    // How to ask for free memory; tests replace it.
    std::function<Result<HostMemory>()> host_memory = [] { return read_host_memory(); };
  };

  explicit Slab(Options options);
  ~Slab();
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  // Without a fixed ceiling, before a state of `state_bytes` is staged: raises it as far as
  // DefaultCeiling says, at most to half of what host and cgroup have free (what the slab has
  // mapped already counts as free). It never sinks. Fails only if free memory cannot be read.
  [[nodiscard]] Status adapt(std::uint64_t state_bytes);

  // One lease per size, all or none, in order. Where memory is taken by leases still held, waits
  // for them until the deadline (one in the past: does not wait) and then fails with kTimeout, or
  // until it is interrupted (kUnavailable).
  // Fails at once with kMemoryLimit if the sizes could never fit under the ceiling, or if host or
  // cgroup have too little free for it even when every lease has come back (both figures are
  // named). Which of several waiters is served first is not defined.
  [[nodiscard]] Result<std::vector<Lease>> lease(std::span<const std::uint64_t> sizes,
                                                 base::Wait& wait);

  // No more leases will be asked for: memory that is not leased goes back to the system, and what
  // is leased when it comes back. Asking all the same works.
  void retire();

  [[nodiscard]] std::uint64_t host_bytes_max() const;
  [[nodiscard]] std::uint64_t bytes_mapped() const;
  [[nodiscard]] std::uint64_t bytes_in_use() const;  // Of leases, rounded up to pages.

 private:
  const bool shared_;
  const std::shared_ptr<Arena> arena_;
};

}  // namespace strandline::memory
