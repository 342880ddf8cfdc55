// Pages that other processes can map: one memory file, described by a table at its beginning.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/unique_fd.h"
#include "memory/free_ranges.h"
#include "memory/generation_table.h"
#include "memory/pages.h"
#include "strandline/error.h"

namespace strandline::memory {

// How much address space, and so how long a file, a slab asks for: several times what it may ever
// hold, so that there is always a gap that fits, whatever was left between long-lived leases.
inline constexpr std::uint64_t kReservedPerHostByte = 4;
inline constexpr std::uint64_t kReservedBytesMin = std::uint64_t{1} << 30;

// Thread-safety: as Pages; id() is constant.
class SharedPages final : public Pages {
 public:
  SharedPages();
  ~SharedPages() override;
  SharedPages(const SharedPages&) = delete;
  SharedPages& operator=(const SharedPages&) = delete;

  Result<std::byte*> map(std::uint64_t bytes) override;
  Status back(std::byte* data, std::uint64_t bytes) override;
  void unmap(std::byte* data, std::uint64_t bytes) override;
  [[nodiscard]] std::size_t places_free() const override { return places_free_.size(); }
  void open(std::byte* data, std::uint64_t bytes) override;
  bool close(std::byte* data) override;
  void cancel(std::byte* data) override;

  // 32 hex digits.
  [[nodiscard]] const std::string& id() const { return id_; }
  [[nodiscard]] int descriptor() const { return file_.get(); }  // -1 until the first map().
  [[nodiscard]] GenerationTable table() const { return GenerationTable(base_); }

  // The open range that begins at `data`. REQUIRES: there is one.
  [[nodiscard]] Generation generation_at(std::byte* data) const;
  // Where an open range is; null if there is none of that number.
  [[nodiscard]] std::byte* find(std::uint64_t generation) const;

 private:
  using Open = std::map<std::byte*, Generation>;

  void forget(Open::iterator range);
  Status reserve(std::uint64_t bytes);
  Status create_file(std::uint64_t bytes);

  const std::string id_;
  const std::uint64_t fork_generation_;
  base::UniqueFd file_;
  std::byte* base_ = nullptr;  // Address minus base_ is the offset in the file.
  std::uint64_t reserved_bytes_ = 0;
  FreeRanges unused_;  // Addresses without pages.
  std::uint64_t next_serial_ = 1;
  std::vector<std::uint64_t> places_free_;
  Open open_;
};

}  // namespace strandline::memory
