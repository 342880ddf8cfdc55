#include "format/rank_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <unordered_set>

#include "base/result_macros.h"
#include "format/json_reader.h"
#include "format/json_text.h"
#include "format/names.h"
#include "format/version.h"

namespace strandline::format {
namespace {

constexpr std::string_view kWhat = "rank file";
constexpr std::uint64_t kDigestHexBytes = 32;
constexpr std::uint32_t kDepthMax = 16;  // The file needs 6; a later minor version may add some.

void append_tensor(std::string& out, const RankFile::Tensor& tensor) {
  out += R"({"name":)";
  append_json_string(out, tensor.name);
  out += R"(,"bytes":)";
  append_json_unsigned(out, tensor.bytes);
  out += R"(,"digests":")";
  for (const Digest& digest : tensor.digests) out += digest.hex();
  out += "\"}";
}

void append_shard(std::string& out, const RankFile::Shard& shard) {
  out += R"({"name":)";
  append_json_string(out, shard.name);
  out += R"(,"tensors":[)";
  for (std::size_t i = 0; i < shard.tensors.size(); ++i) {
    if (i != 0) out += ',';
    append_tensor(out, shard.tensors[i]);
  }
  out += "]}";
}

Result<RankFile::Tensor> read_tensor(const JsonNode& node) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode name, members.member("name"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode bytes, members.member("bytes"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode digests, members.member("digests"));
  RankFile::Tensor tensor;
  STRANDLINE_ASSIGN_OR_RETURN(tensor.name, name.text());
  STRANDLINE_ASSIGN_OR_RETURN(tensor.bytes, bytes.unsigned_integer());
  STRANDLINE_ASSIGN_OR_RETURN(const std::string_view hex, digests.text());
  if (tensor.name.find('\0') != std::string::npos) return name.corrupt("has a NUL");
  const std::uint64_t count = digest_chunk_count(tensor.bytes);
  if (hex.size() % kDigestHexBytes != 0 || hex.size() / kDigestHexBytes != count) {
    return digests.corrupt(fmt::format("are {} digits where {} bytes have {} digests of {} digits",
                                       hex.size(), tensor.bytes, count, kDigestHexBytes));
  }
  tensor.digests.reserve(count);
  for (std::size_t i = 0; i < hex.size(); i += kDigestHexBytes) {
    const auto digest = Digest::from_hex(hex.substr(i, kDigestHexBytes));
    if (!digest) return digests.corrupt("have a digit that is not lower-case hexadecimal");
    tensor.digests.push_back(*digest);
  }
  return tensor;
}

Result<RankFile::Shard> read_shard(const JsonNode& node) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode name, members.member("name"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode tensors, members.member("tensors"));
  RankFile::Shard shard;
  STRANDLINE_ASSIGN_OR_RETURN(shard.name, name.text());
  if (!is_file_name(shard.name)) return name.corrupt("is no name that a file of a step can have");
  std::unordered_set<std::string> names;
  STRANDLINE_RETURN_IF_ERROR(
      tensors.for_each_item([&](const JsonNode& item, std::size_t) -> Status {
        STRANDLINE_ASSIGN_OR_RETURN(RankFile::Tensor tensor, read_tensor(item));
        if (!names.insert(tensor.name).second) {
          return item.corrupt("has a name that is there twice");
        }
        shard.tensors.push_back(std::move(tensor));
        return {};
      }));
  return shard;
}

}  // namespace

std::string write_rank_file(const RankFile& file) {
  std::string out = "{";
  append_format(out);
  out += R"(,"run":)";
  append_json_string(out, file.run);
  fmt::format_to(std::back_inserter(out), R"(,"step":{},"rank":{},"shards":[)", file.step,
                 file.rank);
  for (std::size_t i = 0; i < file.shards.size(); ++i) {
    if (i != 0) out += ',';
    append_shard(out, file.shards[i]);
  }
  out += "]}\n";
  return out;
}

Result<RankFile> parse_rank_file(std::string_view text) {
  if (text.size() > kRankFileBytesMax) {
    return failure(ErrorCode::kCorrupt, fmt::format("{}: is {} bytes long; at most {} are allowed",
                                                    kWhat, text.size(), kRankFileBytesMax));
  }
  STRANDLINE_ASSIGN_OR_RETURN(const JsonDocument document,
                              JsonDocument::parse(kWhat, text, kDepthMax));
  const JsonNode node = document.root();
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject root, node.object());
  STRANDLINE_RETURN_IF_ERROR(read_format(root));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode run, root.member("run"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode step, root.member("step"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode rank, root.member("rank"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode shards, root.member("shards"));
  RankFile file;
  STRANDLINE_ASSIGN_OR_RETURN(file.run, run.text());
  STRANDLINE_ASSIGN_OR_RETURN(file.step, step.integer());
  STRANDLINE_ASSIGN_OR_RETURN(file.rank, read_uint32(rank));
  if (file.step < 0) return step.corrupt("is negative");
  std::unordered_set<std::string> names;
  STRANDLINE_RETURN_IF_ERROR(shards.for_each_item([&](const JsonNode& item, std::size_t) -> Status {
    STRANDLINE_ASSIGN_OR_RETURN(RankFile::Shard shard, read_shard(item));
    if (!names.insert(shard.name).second) return item.corrupt("has a name that is there twice");
    file.shards.push_back(std::move(shard));
    return {};
  }));
  return file;
}

}  // namespace strandline::format
