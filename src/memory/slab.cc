#include "memory/slab.h"

#include <limits>
#include <utility>

#include "base/checked_math.h"
#include "memory/arena.h"
#include "memory/exchange.h"
#include "memory/shared_pages.h"

namespace strandline::memory {
namespace {

std::shared_ptr<Arena> make_arena(Slab::Options options) {
  const bool shared = options.shared;
  auto arena = std::make_shared<Arena>(std::move(options));
  if (shared) exchange().add(arena->id(), arena);
  return arena;
}

}  // namespace

std::byte* Lease::data() const { return range_ == nullptr ? nullptr : range_->data(); }

std::uint64_t Lease::bytes() const { return range_ == nullptr ? 0 : range_->bytes(); }

Slab::Slab(Options options) : shared_(options.shared), arena_(make_arena(std::move(options))) {}
Slab::~Slab() = default;

Status Slab::adapt(std::uint64_t state_bytes) { return arena_->adapt(state_bytes); }

Result<std::vector<Lease>> Slab::lease(std::span<const std::uint64_t> sizes, base::Wait& wait) {
  // What was claimed a moment ago is free now.
  if (shared_) exchange().sends().sweep();
  std::vector<std::uint64_t> rounded;
  rounded.reserve(sizes.size());
  // What cannot be rounded up never fits either.
  constexpr std::uint64_t kMost =
      std::numeric_limits<std::uint64_t>::max() / kPageBytes * kPageBytes;
  for (const std::uint64_t bytes : sizes) {
    rounded.push_back(bytes > kMost ? kMost : base::round_up(bytes, kPageBytes));
  }
  Result<std::vector<std::byte*>> ranges = arena_->take(rounded, wait);
  if (!ranges) return failure(std::move(ranges).error());
  std::vector<Lease> leases(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    leases[i].range_ = std::make_shared<const LeasedRange>(arena_, (*ranges)[i], sizes[i]);
  }
  return leases;
}

void Slab::retire() { arena_->retire(); }
std::uint64_t Slab::host_bytes_max() const { return arena_->bytes_max(); }
std::uint64_t Slab::bytes_mapped() const { return arena_->bytes_mapped(); }
std::uint64_t Slab::bytes_in_use() const { return arena_->bytes_in_use(); }

}  // namespace strandline::memory
