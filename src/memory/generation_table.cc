#include "memory/generation_table.h"

#include <cstring>

namespace strandline::memory {
namespace {

constexpr std::string_view kMagic = "STRANDSL";
constexpr std::size_t kSlabCharacters = 32;

// In place 0. Written before any other process can know of the file, and then only read.
struct HeadPlace {
  char magic[8];
  std::uint32_t version;
  std::uint32_t places;
  char slab[kSlabCharacters];
  std::uint64_t reserved[2];
};
static_assert(sizeof(HeadPlace) == GenerationTable::kPlaceBytes);

constexpr std::uint64_t kAlive = 1;
constexpr std::uint64_t kDead = 2;

}  // namespace

// Zero until it is used for the first time.
struct GenerationTable::Place {
  std::atomic<std::uint64_t> generation;
  std::atomic<std::uint64_t> step;
  std::atomic<std::uint64_t> offset;
  std::atomic<std::uint64_t> bytes;
  std::atomic<std::uint64_t> state;
  std::atomic<std::uint64_t> sent;
  std::atomic<std::uint64_t> claimed;
  std::uint64_t reserved;
};

GenerationTable::Place& GenerationTable::place_of(std::uint64_t number) const {
  static_assert(sizeof(Place) == kPlaceBytes);
  static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "other processes see no locks");
  return reinterpret_cast<Place*>(memory_)[number % kPlaces];
}

void GenerationTable::create(std::string_view slab) {
  HeadPlace head{};
  std::memcpy(head.magic, kMagic.data(), sizeof(head.magic));
  head.version = kTableVersion;
  head.places = kPlaces;
  std::memcpy(head.slab, slab.data(), sizeof(head.slab));
  std::memcpy(memory_, &head, sizeof(head));
}

GenerationTable::Head GenerationTable::head(std::string_view slab) const {
  HeadPlace head{};
  std::memcpy(&head, memory_, sizeof(head));
  if (std::string_view(head.magic, sizeof(head.magic)) != kMagic) return Head::kNotATable;
  if (head.version != kTableVersion || head.places != kPlaces) return Head::kOtherVersion;
  if (std::string_view(head.slab, sizeof(head.slab)) != slab) return Head::kOtherSlab;
  return Head::kOurs;
}

void GenerationTable::write(const Generation& generation) {
  Place& place = place_of(generation.number);
  place.generation = generation.number;
  place.step = 0;
  place.offset = generation.offset;
  place.bytes = generation.bytes;
  place.sent = 0;
  place.claimed = 0;
  place.state = kAlive;
}

std::optional<Generation> GenerationTable::find(std::uint64_t number) const {
  if (number % kPlaces == 0) return std::nullopt;
  const Place& place = place_of(number);
  if (place.generation != number || place.state != kAlive) return std::nullopt;
  return Generation{.number = number, .offset = place.offset, .bytes = place.bytes};
}

void GenerationTable::mark_dead(std::uint64_t number) { place_of(number).state = kDead; }

void GenerationTable::count_sent(std::uint64_t number) { ++place_of(number).sent; }

void GenerationTable::count_claimed(std::uint64_t number) { ++place_of(number).claimed; }

bool GenerationTable::all_claimed(std::uint64_t number) const {
  const Place& place = place_of(number);
  return place.claimed >= place.sent;
}

}  // namespace strandline::memory
