// Feeds arbitrary bytes to the parser of safetensors headers. The input is a whole file; where its
// length makes no sense, the input is also tried as the JSON alone.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "format/safetensors.h"

namespace {

using strandline::format::parse_safetensors_header;
using strandline::format::write_safetensors_header;

// A header that was taken must be written and read back the same.
void check_round_trip(const strandline::format::ShardHeader& header) {
  const std::string head = write_safetensors_header(header.tensors);
  const std::uint64_t data_bytes = header.tensors.empty() ? 0 : header.tensors.back().end;
  const auto again =
      parse_safetensors_header(std::as_bytes(std::span(head)), head.size() + data_bytes);
  if (!again || again->tensors.size() != header.tensors.size()) std::abort();
  for (std::size_t i = 0; i < header.tensors.size(); ++i) {
    if (again->tensors[i].name != header.tensors[i].name ||
        again->tensors[i].begin != header.tensors[i].begin) {
      std::abort();
    }
  }
}

void parse_file(std::span<const std::byte> file) {
  if (file.size() < 8) return;
  const auto start = strandline::format::safetensors_data_start(file.first<8>(), file.size());
  if (!start) return;
  const auto header = parse_safetensors_header(file.first(*start), file.size());
  if (header) check_round_trip(*header);
}

// The JSON alone, in a file that has as much data as its first tensors may want.
void parse_json(std::string_view json, std::uint64_t data_bytes) {
  std::string head;
  for (int i = 0; i < 8; ++i) head += static_cast<char>(json.size() >> (8 * i) & 0xff);
  head += json;
  const auto header =
      parse_safetensors_header(std::as_bytes(std::span(head)), head.size() + data_bytes);
  if (header) check_round_trip(*header);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  parse_file(std::as_bytes(std::span(data, size)));
  if (size == 0) return 0;
  const std::string_view json(reinterpret_cast<const char*>(data) + 1, size - 1);
  parse_json(json, data[0]);
  return 0;
}
