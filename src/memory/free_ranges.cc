#include "memory/free_ranges.h"

#include <algorithm>
#include <iterator>

namespace strandline::memory {

std::byte* FreeRanges::take(std::uint64_t bytes) {
  const auto found = by_size_.lower_bound({bytes, nullptr});
  if (found == by_size_.end()) return nullptr;
  const auto [range_bytes, data] = *found;
  remove(data, range_bytes);
  if (range_bytes > bytes) insert(data + bytes, range_bytes - bytes);
  return data;
}

FreeRanges::Range FreeRanges::take_from_smallest(std::uint64_t bytes) {
  const auto [range_bytes, data] = *by_size_.begin();
  const std::uint64_t cut = std::min(range_bytes, bytes);
  remove(data, range_bytes);
  if (cut < range_bytes) insert(data, range_bytes - cut);
  return {.data = data + (range_bytes - cut), .bytes = cut};
}

void FreeRanges::add(std::byte* data, std::uint64_t bytes) {
  const auto next = by_address_.lower_bound(data);
  if (next != by_address_.begin()) {
    const auto [previous_data, previous_bytes] = *std::prev(next);
    if (previous_data + previous_bytes == data) {
      remove(previous_data, previous_bytes);
      data = previous_data;
      bytes += previous_bytes;
    }
  }
  if (next != by_address_.end() && data + bytes == next->first) {
    const auto [next_data, next_bytes] = *next;
    remove(next_data, next_bytes);
    bytes += next_bytes;
  }
  insert(data, bytes);
}

void FreeRanges::insert(std::byte* data, std::uint64_t bytes) {
  by_address_.emplace(data, bytes);
  by_size_.emplace(bytes, data);
  bytes_ += bytes;
}

void FreeRanges::remove(std::byte* data, std::uint64_t bytes) {
  by_address_.erase(data);
  by_size_.erase({bytes, data});
  bytes_ -= bytes;
}

}  // namespace strandline::memory
