// Feeds arbitrary bytes to the parser of rank files.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "format/rank_file.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using strandline::format::parse_rank_file;
  using strandline::format::write_rank_file;
  const auto file = parse_rank_file(std::string_view(reinterpret_cast<const char*>(data), size));
  if (!file) return 0;
  // What was taken must be written again, and from then on stay the same text.
  const std::string text = write_rank_file(*file);
  const auto again = parse_rank_file(text);
  if (!again || write_rank_file(*again) != text) std::abort();
  return 0;
}
