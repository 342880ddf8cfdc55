// The beginning of a shared slab's file, where it describes itself to other processes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace strandline::memory {

// Sixteen pages: nobody holds a thousand stagings at once, and it costs little.
inline constexpr std::uint64_t kTableBytes = std::uint64_t{64} << 10;

inline constexpr std::uint32_t kTableVersion = 1;

// What the table says of a generation, which is one lease: read once and then checked, because
// whoever can write the file can write the table.
struct Generation {
  std::uint64_t number = 0;  // Never used twice; its remainder by kPlaces is its place.
  std::uint64_t offset = 0;  // In the file, in bytes.
  std::uint64_t bytes = 0;
};

// A view of the table in mapped memory, which must outlive it. The memory is shared with other
// processes that may change it at any time; so nothing read from it is used unchecked, and the
// slab's own process keeps what it relies on elsewhere. Thread-safety: thread-safe, each member is
// read and written atomically.
//
//   place 0      magic, version, number of places, slab id
//   place 1...   generation, step, offset, bytes, state, sent, claimed; 64 bytes each
//
// All in the machine's byte order. `step` is 0 for stagers.
class GenerationTable {
 public:
  static constexpr std::uint64_t kPlaceBytes = 64;
  static constexpr std::uint64_t kPlaces = kTableBytes / kPlaceBytes;

  GenerationTable() = default;
  explicit GenerationTable(std::byte* memory) : memory_(memory) {}

  // Writes the head. `slab` has 32 characters. REQUIRES: the memory is zero.
  void create(std::string_view slab);

  enum class Head { kOurs, kOtherVersion, kOtherSlab, kNotATable };
  [[nodiscard]] Head head(std::string_view slab) const;

  // Only the slab's own process writes generations. REQUIRES: 0 < place < kPlaces.
  void write(const Generation& generation);

  // The generation, if it is the one in its place and alive.
  [[nodiscard]] std::optional<Generation> find(std::uint64_t number) const;
  void mark_dead(std::uint64_t number);

  // A range of the generation was described to another process; another process has attached one.
  void count_sent(std::uint64_t number);
  void count_claimed(std::uint64_t number);
  [[nodiscard]] bool all_claimed(std::uint64_t number) const;

 private:
  struct Place;
  [[nodiscard]] Place& place_of(std::uint64_t number) const;

  std::byte* memory_ = nullptr;
};

}  // namespace strandline::memory
