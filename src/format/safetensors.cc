// Headers of safetensors files.
//
// The header is the one part of a checkpoint that strangers write too, so the parser trusts
// nothing: the length is compared with the file before anything is allocated, the JSON is bounded
// and free of duplicates, and the byte ranges must tile the data section exactly. That last rule
// (no gap, no overlap, nothing behind) is safetensors' own. It makes every later read safe: a
// tensor that this parser gave lies inside the file and shares no byte with another one.
//
// Nesting is checked at a depth of 8, far beyond the 4 that a header needs, so that a member added
// by some later safetensors does not make a file unreadable.

#include "format/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/checked_math.h"
#include "base/result_macros.h"
#include "format/json_reader.h"
#include "format/json_text.h"
#include "format/tensor_size.h"

namespace strandline::format {
namespace {

constexpr std::string_view kWhat = "safetensors header";
constexpr std::string_view kMetadataName = "__metadata__";
constexpr std::uint64_t kPrefixBytes = 8;
constexpr std::uint32_t kHeaderDepthMax = 8;

tl::unexpected<Error> corrupt(std::string_view problem) {
  return failure(ErrorCode::kCorrupt, fmt::format("{}: {}", kWhat, problem));
}

void append_numbers(std::string& out, std::span<const std::uint64_t> numbers) {
  out += '[';
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    if (i != 0) out += ',';
    append_json_unsigned(out, numbers[i]);
  }
  out += ']';
}

std::string little_endian(std::uint64_t number) {
  std::string bytes;
  for (std::uint64_t i = 0; i < kPrefixBytes; ++i) {
    bytes += static_cast<char>(number >> (8 * i) & 0xff);
  }
  return bytes;
}

std::uint64_t from_little_endian(std::span<const std::byte, kPrefixBytes> bytes) {
  std::uint64_t number = 0;
  for (std::size_t i = 0; i < kPrefixBytes; ++i) {
    number |= std::to_integer<std::uint64_t>(bytes[i]) << (8 * i);
  }
  return number;
}

Status check_metadata(const JsonNode& node) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject metadata, node.object());
  return metadata.for_each_member([](std::string_view, const JsonNode& value) -> Status {
    STRANDLINE_RETURN_IF_ERROR(value.text());
    return {};
  });
}

Result<ShardTensor> read_tensor(std::string_view name, const JsonNode& node) {
  if (name.find('\0') != std::string_view::npos) return node.corrupt("has a name with a NUL");
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode dtype, members.member("dtype"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode shape, members.member("shape"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode data_offsets, members.member("data_offsets"));

  ShardTensor tensor;
  tensor.name = name;
  STRANDLINE_ASSIGN_OR_RETURN(const std::string_view dtype_text, dtype.text());
  const auto known_dtype = dtype_from_name(dtype_text);
  if (!known_dtype) return dtype.corrupt("is no element type of safetensors");
  tensor.dtype = *known_dtype;
  STRANDLINE_ASSIGN_OR_RETURN(tensor.shape, shape.unsigned_integers());
  STRANDLINE_ASSIGN_OR_RETURN(const auto offsets, data_offsets.unsigned_integers());
  if (offsets.size() != 2) return data_offsets.corrupt("does not have two offsets");
  tensor.begin = offsets[0];
  tensor.end = offsets[1];
  if (tensor.end < tensor.begin) return data_offsets.corrupt("ends before it begins");
  const auto bytes = tensor_bytes(tensor.dtype, tensor.shape);
  if (!bytes) return shape.corrupt("gives a size that overflows or does not fill whole bytes");
  if (*bytes != tensor.end - tensor.begin) {
    return data_offsets.corrupt(fmt::format("span {} bytes where dtype and shape need {}",
                                            tensor.end - tensor.begin, *bytes));
  }
  return tensor;
}

// Sorts tensors by their bytes and checks that they tile [0, data_bytes).
Status order_and_check_tiling(std::vector<ShardTensor>& tensors, std::uint64_t data_bytes) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const ShardTensor& a, const ShardTensor& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  std::uint64_t covered = 0;
  for (const ShardTensor& tensor : tensors) {
    if (tensor.begin != covered) {
      return corrupt(
          fmt::format("the bytes [{}, {}) of tensor '{}' {} those before it, which end at {}",
                      tensor.begin, tensor.end, tensor.name,
                      tensor.begin < covered ? "overlap" : "leave a gap after", covered));
    }
    covered = tensor.end;
  }
  if (covered != data_bytes) {
    return corrupt(
        fmt::format("the tensors take {} bytes but the file holds {}", covered, data_bytes));
  }
  return {};
}

}  // namespace

std::string write_safetensors_header(std::span<const ShardTensor> tensors) {
  std::string json = R"({"__metadata__":{"format":"pt"})";
  for (const ShardTensor& tensor : tensors) {
    json += ',';
    append_json_string(json, tensor.name);
    json += R"(:{"dtype":")";
    json += dtype_name(tensor.dtype);
    json += R"(","shape":)";
    append_numbers(json, tensor.shape);
    json += R"(,"data_offsets":)";
    append_numbers(json, std::array{tensor.begin, tensor.end});
    json += '}';
  }
  json += '}';
  json.resize(base::round_up(kPrefixBytes + json.size(), kDataAlignmentBytes) - kPrefixBytes, ' ');
  return little_endian(json.size()) + json;
}

Result<std::uint64_t> safetensors_data_start(std::span<const std::byte, 8> prefix,
                                             std::uint64_t file_bytes) {
  const std::uint64_t json_bytes = from_little_endian(prefix);
  if (json_bytes > kSafetensorsHeaderBytesMax) {
    return corrupt(fmt::format("claims a length of {} bytes; at most {} are allowed", json_bytes,
                               kSafetensorsHeaderBytesMax));
  }
  if (file_bytes < kPrefixBytes || json_bytes > file_bytes - kPrefixBytes) {
    return corrupt(fmt::format("claims a length of {} bytes in a file of {}: the file is truncated",
                               json_bytes, file_bytes));
  }
  return kPrefixBytes + json_bytes;
}

Result<ShardHeader> parse_safetensors_header(std::span<const std::byte> head,
                                             std::uint64_t file_bytes) {
  if (head.size() < kPrefixBytes) return corrupt("the file ends inside the header's length");
  ShardHeader header;
  STRANDLINE_ASSIGN_OR_RETURN(header.data_start,
                              safetensors_data_start(head.first<kPrefixBytes>(), file_bytes));
  if (header.data_start != head.size()) {
    return corrupt(
        fmt::format("is {} bytes long where its length says {}", head.size(), header.data_start));
  }
  const std::string_view json(reinterpret_cast<const char*>(head.data()) + kPrefixBytes,
                              head.size() - kPrefixBytes);
  if (!json.starts_with('{')) return corrupt("does not begin with '{'");
  STRANDLINE_ASSIGN_OR_RETURN(const JsonDocument document,
                              JsonDocument::parse(kWhat, json, kHeaderDepthMax));
  const JsonNode root = document.root();
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, root.object());
  STRANDLINE_RETURN_IF_ERROR(
      members.for_each_member([&](std::string_view name, const JsonNode& node) -> Status {
        if (name == kMetadataName) return check_metadata(node);
        STRANDLINE_ASSIGN_OR_RETURN(ShardTensor tensor, read_tensor(name, node));
        header.tensors.push_back(std::move(tensor));
        return {};
      }));
  STRANDLINE_RETURN_IF_ERROR(
      order_and_check_tiling(header.tensors, file_bytes - header.data_start));
  return header;
}

}  // namespace strandline::format
