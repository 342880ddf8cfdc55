// Ranges of addresses that nobody uses, joined with their neighbours.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <utility>

namespace strandline::memory {

// Thread-safety: none.
class FreeRanges {
 public:
  struct Range {
    std::byte* data = nullptr;
    std::uint64_t bytes = 0;
  };

  // The beginning of the smallest range of at least `bytes`; null if there is none. What is left of
  // that range stays free.
  [[nodiscard]] std::byte* take(std::uint64_t bytes);

  // As many bytes as are there, at most `bytes`, of the end of the smallest range: the least likely
  // to fit anything. REQUIRES: bytes() > 0.
  [[nodiscard]] Range take_from_smallest(std::uint64_t bytes);

  void add(std::byte* data, std::uint64_t bytes);

  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }

 private:
  void insert(std::byte* data, std::uint64_t bytes);
  void remove(std::byte* data, std::uint64_t bytes);

  // The same ranges twice: by address for joining, by size for the best fit.
  std::map<std::byte*, std::uint64_t> by_address_;
  std::set<std::pair<std::uint64_t, std::byte*>> by_size_;
  std::uint64_t bytes_ = 0;
};

}  // namespace strandline::memory
