// The manifest: one JSON object that is the truth about a step.
//
// Frame. The text ends exactly `,"manifest_digest":"<32 hex digits>"}` and a newline, and the
// digest is of every byte before that comma. So each byte is either digested or compared with what
// must stand there, and damage is found before a parser sees it. The digest finds damage, not
// forgery: the parser still treats every byte as hostile. The frame and the member `format` are the
// same in all versions, so that "too new" can be told from "damaged".
//
// Reading goes in three passes. The members in front come first, `format` before all others. Then
// the tree is read into a StateDict, one tensor leaf after the other; parts are checked on the way.
// An alias may stand before the tensor that it names, so paths are resolved last, through a sorted
// index, since looking through the children of a large dict for every alias would be quadratic.
//
// What was rejected: a digest over the text with the digest zeroed (needs a second copy, and leaves
// open which zeroes); a digest in a separate file (a step could be torn between the two);
// simdjson's on-demand mode (errors deep in the file would come after half of it was believed).

#include "format/manifest.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <unordered_set>

#include "base/checked_math.h"
#include "base/result_macros.h"
#include "format/digest.h"
#include "format/json_reader.h"
#include "format/json_text.h"
#include "format/names.h"
#include "format/tensor_size.h"
#include "format/tree_json.h"
#include "format/tree_path.h"
#include "format/value_json.h"
#include "format/version.h"

namespace strandline::format {
namespace {

constexpr std::string_view kDigestAlgorithm = "xxh3-128";
constexpr std::string_view kTailBegin = R"(,"manifest_digest":")";
constexpr std::string_view kTailEnd = "\"}\n";
constexpr std::size_t kDigestHexBytes = 32;
constexpr std::size_t kTailBytes = kTailBegin.size() + kDigestHexBytes + kTailEnd.size();

std::string tail_for(std::string_view body) {
  return fmt::format("{}{}{}", kTailBegin, digest_of(body).hex(), kTailEnd);
}

// ---- Writing ----

Status append_text(std::string& out, std::string_view text, std::string_view what) {
  if (!is_valid_utf8(text)) {
    return failure(ErrorCode::kUnsupported,
                   fmt::format("cannot write the manifest: {} is not valid UTF-8", what));
  }
  append_json_string(out, text);
  return {};
}

void append_shape(std::string& out, const std::vector<std::uint64_t>& shape) {
  out += '[';
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i != 0) out += ',';
    append_json_unsigned(out, shape[i]);
  }
  out += ']';
}

Status append_part(std::string& out, const TensorPart& part) {
  out += R"({"file":)";
  STRANDLINE_RETURN_IF_ERROR(append_text(out, part.file, "the name of a file"));
  out += R"(,"name":)";
  STRANDLINE_RETURN_IF_ERROR(append_text(out, part.name, "the name of a tensor"));
  out += R"(,"offset":)";
  append_shape(out, part.offset);
  out += R"(,"shape":)";
  append_shape(out, part.shape);
  out += '}';
  return {};
}

Status append_tensor(std::string& out, const Manifest& manifest, std::uint32_t index) {
  const Structure& structure = manifest.tree.structure();
  const Structure::Tensor& tensor = structure.tensors()[index];
  const TensorEntry& entry = manifest.entries[index];
  out += entry.alias ? R"({"alias":{"dtype":")" : R"({"tensor":{"dtype":")";
  out += dtype_name(tensor.dtype);
  out += R"(","shape":)";
  append_shape(out, tensor.shape);
  if (!tensor.framework.empty()) {
    out += R"(,"framework":)";
    STRANDLINE_RETURN_IF_ERROR(append_text(out, tensor.framework, "the name of a framework"));
  }
  if (entry.alias) {
    out += R"(,"alias_of":)";
    const std::uint32_t target = structure.tensors()[entry.alias->tensor].node;
    STRANDLINE_RETURN_IF_ERROR(append_tree_path(out, structure, target));
    out += R"(,"offset_bytes":)";
    append_json_unsigned(out, entry.alias->offset_bytes);
  } else {
    out += R"(,"parts":[)";
    for (std::size_t i = 0; i < entry.parts.size(); ++i) {
      if (i != 0) out += ',';
      STRANDLINE_RETURN_IF_ERROR(append_part(out, entry.parts[i]));
    }
    out += ']';
  }
  out += "}}";
  return {};
}

Status append_metadata(std::string& out, const StateDict& metadata) {
  return append_tree(out, metadata, [&](std::string&, std::uint32_t tensor) -> Status {
    const Structure& structure = metadata.structure();
    const std::string path = structure.path_text(structure.tensors()[tensor].node);
    return failure(Error{.code = ErrorCode::kUnsupported,
                         .message = fmt::format("cannot save '{}' in the metadata: it is a tensor; "
                                                "put it into the state",
                                                path),
                         .key_path = path});
  });
}

Status append_metrics(std::string& out, const std::map<std::string, double>& metrics) {
  out += '{';
  bool first = true;
  for (const auto& [name, number] : metrics) {
    if (!first) out += ',';
    first = false;
    STRANDLINE_RETURN_IF_ERROR(append_text(out, name, "the name of a metric"));
    out += ':';
    append_number(out, number);
  }
  out += '}';
  return {};
}

Status append_file(std::string& out, const FileInfo& file) {
  out += R"({"name":)";
  STRANDLINE_RETURN_IF_ERROR(append_text(out, file.name, "the name of a file"));
  out += R"(,"bytes":)";
  append_json_unsigned(out, file.bytes);
  out += R"(,"group":)";
  STRANDLINE_RETURN_IF_ERROR(append_text(out, file.group, "the name of a group"));
  out += R"(,"rank":)";
  append_json_unsigned(out, file.rank);
  out += R"(,"header_digest":)";
  STRANDLINE_RETURN_IF_ERROR(append_text(out, file.header_digest, "the digest of a file"));
  out += '}';
  return {};
}

Status append_body(std::string& out, const Manifest& manifest) {
  const CheckpointInfo& info = manifest.info;
  out += '{';
  append_format(out);
  out += R"(,"run":)";
  STRANDLINE_RETURN_IF_ERROR(append_text(out, info.run, "the run"));
  const auto parent = info.parent ? fmt::format("{}", *info.parent) : std::string("null");
  fmt::format_to(std::back_inserter(out),
                 R"(,"step":{},"sequence":{},"parent":{},"world":{},"created_ns":{})", info.step,
                 info.sequence, parent, info.world, info.created_ns);
  out += R"(,"metadata":)";
  STRANDLINE_RETURN_IF_ERROR(append_metadata(out, info.metadata));
  out += R"(,"metrics":)";
  STRANDLINE_RETURN_IF_ERROR(append_metrics(out, info.metrics));
  fmt::format_to(std::back_inserter(out), R"(,"digest":{{"algorithm":"{}","chunk_bytes":{}}})",
                 kDigestAlgorithm, kDigestChunkBytes);
  out += R"(,"files":[)";
  for (std::size_t i = 0; i < info.files.size(); ++i) {
    if (i != 0) out += ',';
    STRANDLINE_RETURN_IF_ERROR(append_file(out, info.files[i]));
  }
  out += R"(],"tree":)";
  return append_tree(out, manifest.tree, [&](std::string& text, std::uint32_t tensor) {
    return append_tensor(text, manifest, tensor);
  });
}

// ---- Reading ----

tl::unexpected<Error> corrupt(std::string_view problem) {
  return failure(ErrorCode::kCorrupt, fmt::format("{}: {}", kManifestName, problem));
}

// Checks size, tail and digest, in that order.
Status check_frame(std::string_view text) {
  if (text.size() > kManifestBytesMax) {
    return corrupt(
        fmt::format("is {} bytes long; at most {} are allowed", text.size(), kManifestBytesMax));
  }
  if (text.size() < kTailBytes) return corrupt("is truncated: it ends before its digest");
  const std::string_view body = text.substr(0, text.size() - kTailBytes);
  const std::string_view tail = text.substr(body.size());
  if (!tail.starts_with(kTailBegin) || !tail.ends_with(kTailEnd)) {
    return corrupt("is truncated or damaged: it does not end with its digest");
  }
  if (tail != tail_for(body)) return corrupt("is damaged: its digest does not match");
  return {};
}

Status check_digest_member(const JsonObject& root) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode node, root.member("digest"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode algorithm, members.member("algorithm"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode chunk, members.member("chunk_bytes"));
  STRANDLINE_ASSIGN_OR_RETURN(const std::string_view algorithm_name, algorithm.text());
  STRANDLINE_ASSIGN_OR_RETURN(const std::uint64_t chunk_bytes, chunk.unsigned_integer());
  if (algorithm_name != kDigestAlgorithm || chunk_bytes != kDigestChunkBytes) {
    return failure(
        ErrorCode::kUnsupported,
        fmt::format("{}: digests are '{}' of {} bytes each; this Strandline knows '{}' of {}: read "
                    "it with a newer one",
                    node.place(), algorithm_name, chunk_bytes, kDigestAlgorithm,
                    kDigestChunkBytes));
  }
  return {};
}

Status read_numbers(const JsonObject& root, CheckpointInfo& info) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode run, root.member("run"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode step, root.member("step"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode sequence, root.member("sequence"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode parent, root.member("parent"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode world, root.member("world"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode created_ns, root.member("created_ns"));
  STRANDLINE_ASSIGN_OR_RETURN(info.run, run.text());
  STRANDLINE_ASSIGN_OR_RETURN(info.step, step.integer());
  STRANDLINE_ASSIGN_OR_RETURN(info.sequence, sequence.unsigned_integer());
  STRANDLINE_ASSIGN_OR_RETURN(info.world, read_uint32(world));
  STRANDLINE_ASSIGN_OR_RETURN(info.created_ns, created_ns.integer());
  if (info.step < 0) return step.corrupt("is negative");
  if (info.sequence == 0) return sequence.corrupt("is 0; the first is 1");
  if (info.world == 0) return world.corrupt("is 0; at least one rank wrote it");
  if (parent.type() == JsonNode::Type::kNull) return {};
  STRANDLINE_ASSIGN_OR_RETURN(info.parent, parent.unsigned_integer());
  // Whoever follows parents must come to an end.
  if (*info.parent >= info.sequence) return parent.corrupt("is not before the sequence");
  return {};
}

Status read_metadata(const JsonObject& root, CheckpointInfo& info) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode metadata, root.member("metadata"));
  STRANDLINE_ASSIGN_OR_RETURN(
      info.metadata,
      read_tree(metadata, [](std::string_view, const JsonNode& body) -> Result<TensorView> {
        return body.corrupt("is a tensor, which metadata cannot hold");
      }));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode metrics, root.member("metrics"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, metrics.object());
  return members.for_each_member([&](std::string_view name, const JsonNode& node) -> Status {
    STRANDLINE_ASSIGN_OR_RETURN(info.metrics[std::string(name)], read_number(node));
    return {};
  });
}

Result<FileInfo> read_file(const JsonNode& node, std::uint32_t world) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode name, members.member("name"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode bytes, members.member("bytes"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode group, members.member("group"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode rank, members.member("rank"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode header_digest, members.member("header_digest"));
  FileInfo file;
  STRANDLINE_ASSIGN_OR_RETURN(file.name, name.text());
  STRANDLINE_ASSIGN_OR_RETURN(file.bytes, bytes.unsigned_integer());
  STRANDLINE_ASSIGN_OR_RETURN(file.group, group.text());
  STRANDLINE_ASSIGN_OR_RETURN(file.rank, read_uint32(rank));
  STRANDLINE_ASSIGN_OR_RETURN(file.header_digest, header_digest.text());
  if (!is_file_name(file.name) || file.name == kManifestName) {
    return name.corrupt("is no name that a file of a step can have");
  }
  if (file.rank >= world) return rank.corrupt("is no rank of this world");
  if (!Digest::from_hex(file.header_digest)) {
    return header_digest.corrupt("is not 32 lower-case hexadecimal digits");
  }
  return file;
}

Status read_files(const JsonObject& root, CheckpointInfo& info) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode files, root.member("files"));
  std::unordered_set<std::string> names;
  std::uint64_t bytes = 0;
  return files.for_each_item([&](const JsonNode& node, std::size_t) -> Status {
    STRANDLINE_ASSIGN_OR_RETURN(FileInfo file, read_file(node, info.world));
    if (!names.insert(file.name).second) return node.corrupt("has a name that is there twice");
    const auto sum = base::checked_add(bytes, file.bytes);
    if (!sum) return node.corrupt("makes the sum of all sizes overflow");
    bytes = *sum;
    info.files.push_back(std::move(file));
    return {};
  });
}

// Collects what the tree says about its tensors.
class EntryReader {
 public:
  EntryReader(const std::vector<FileInfo>& files, std::vector<TensorEntry>& entries)
      : entries_(entries) {
    for (const FileInfo& file : files) file_names_.insert(file.name);
  }

  Result<TensorView> read(std::string_view kind, const JsonNode& body) {
    STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, body.object());
    STRANDLINE_ASSIGN_OR_RETURN(TensorView view, read_view(members));
    TensorEntry& entry = entries_.emplace_back();
    if (kind == "tensor") {
      STRANDLINE_ASSIGN_OR_RETURN(const JsonNode parts, members.member("parts"));
      STRANDLINE_RETURN_IF_ERROR(read_parts(parts, view.shape, entry));
    } else {
      STRANDLINE_ASSIGN_OR_RETURN(const JsonNode alias_of, members.member("alias_of"));
      STRANDLINE_ASSIGN_OR_RETURN(const JsonNode offset, members.member("offset_bytes"));
      Alias alias;
      alias.tensor = static_cast<std::uint32_t>(entries_.size() - 1);
      STRANDLINE_ASSIGN_OR_RETURN(alias.target, read_tree_path(alias_of));
      STRANDLINE_ASSIGN_OR_RETURN(alias.offset_bytes, offset.unsigned_integer());
      aliases_.push_back(std::move(alias));
    }
    return view;
  }

  // Finds what the aliases are of. REQUIRES: the whole tree was read.
  Status resolve_aliases(const Structure& structure) {
    if (aliases_.empty()) return {};
    const TreePathIndex index(structure);
    for (const Alias& alias : aliases_) {
      STRANDLINE_RETURN_IF_ERROR(resolve(alias, structure, index));
    }
    return {};
  }

 private:
  struct Alias {
    std::uint32_t tensor = 0;
    TreePath target;
    std::uint64_t offset_bytes = 0;
  };

  static Result<TensorView> read_view(const JsonObject& members) {
    STRANDLINE_ASSIGN_OR_RETURN(const JsonNode dtype, members.member("dtype"));
    STRANDLINE_ASSIGN_OR_RETURN(const JsonNode shape, members.member("shape"));
    STRANDLINE_ASSIGN_OR_RETURN(const std::string_view dtype_text, dtype.text());
    const auto known_dtype = dtype_from_name(dtype_text);
    if (!known_dtype) return dtype.corrupt("is no element type of safetensors");
    STRANDLINE_ASSIGN_OR_RETURN(auto extents, shape.unsigned_integers());
    if (!tensor_bytes(*known_dtype, extents)) {
      return shape.corrupt("gives a size that overflows or does not fill whole bytes");
    }
    TensorView view = TensorView::row_major(nullptr, *known_dtype, std::move(extents));
    view.storage_bytes = 0;
    view.writable = false;
    if (const auto framework = members.find("framework")) {
      STRANDLINE_ASSIGN_OR_RETURN(view.framework, framework->text());
    }
    return view;
  }

  Status read_parts(const JsonNode& node, const std::vector<std::uint64_t>& shape,
                    TensorEntry& entry) const {
    STRANDLINE_RETURN_IF_ERROR(node.for_each_item([&](const JsonNode& item, std::size_t) -> Status {
      STRANDLINE_ASSIGN_OR_RETURN(TensorPart part, read_part(item));
      entry.parts.push_back(std::move(part));
      return {};
    }));
    if (entry.parts.empty()) return node.corrupt("is empty: the tensor is nowhere");
    const TensorPart& part = entry.parts.front();
    const auto is_zero = [](std::uint64_t offset) { return offset == 0; };
    const bool is_whole = entry.parts.size() == 1 && part.shape == shape &&
                          part.offset.size() == shape.size() &&
                          std::all_of(part.offset.begin(), part.offset.end(), is_zero);
    if (is_whole) return {};
    return failure(ErrorCode::kUnsupported,
                   fmt::format("{}: the tensor is stored in pieces, which this Strandline cannot "
                               "read: read it with a newer one",
                               node.place()));
  }

  Result<TensorPart> read_part(const JsonNode& node) const {
    STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
    STRANDLINE_ASSIGN_OR_RETURN(const JsonNode file, members.member("file"));
    STRANDLINE_ASSIGN_OR_RETURN(const JsonNode name, members.member("name"));
    STRANDLINE_ASSIGN_OR_RETURN(const JsonNode offset, members.member("offset"));
    STRANDLINE_ASSIGN_OR_RETURN(const JsonNode shape, members.member("shape"));
    TensorPart part;
    STRANDLINE_ASSIGN_OR_RETURN(part.file, file.text());
    STRANDLINE_ASSIGN_OR_RETURN(part.name, name.text());
    STRANDLINE_ASSIGN_OR_RETURN(part.offset, offset.unsigned_integers());
    STRANDLINE_ASSIGN_OR_RETURN(part.shape, shape.unsigned_integers());
    if (!file_names_.contains(part.file)) return file.corrupt("is not listed under files");
    if (part.name.find('\0') != std::string::npos) return name.corrupt("has a NUL");
    return part;
  }

  Status resolve(const Alias& alias, const Structure& structure, const TreePathIndex& index) {
    const Structure::Tensor& tensor = structure.tensors()[alias.tensor];
    const auto bad = [&](std::string_view problem) {
      const std::string path = structure.path_text(tensor.node);
      return failure(
          Error{.code = ErrorCode::kCorrupt,
                .message = fmt::format("{}: the alias '{}' {}", kManifestName, path, problem),
                .key_path = path});
    };
    const auto node = index.find(alias.target);
    if (!node || structure.nodes()[*node].kind != NodeKind::kTensor) {
      return bad("is of something that is not a tensor of the tree");
    }
    const std::uint32_t target = structure.nodes()[*node].leaf;
    if (entries_[target].parts.empty()) return bad("is of another alias");
    const auto end = base::checked_add(alias.offset_bytes, tensor.byte_count());
    if (!end || *end > structure.tensors()[target].byte_count()) {
      return bad("reaches beyond the tensor that it is of");
    }
    const std::uint32_t bits = dtype_bits(tensor.dtype);
    if (bits % 8 == 0 && alias.offset_bytes % (bits / 8) != 0) {
      return bad("begins inside an element of its type");
    }
    entries_[alias.tensor].alias =
        TensorAlias{.tensor = target, .offset_bytes = alias.offset_bytes};
    return {};
  }

  std::unordered_set<std::string> file_names_;
  std::vector<TensorEntry>& entries_;
  std::vector<Alias> aliases_;
};

Status read_entries(const JsonObject& root, Manifest& manifest) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode tree, root.member("tree"));
  EntryReader reader(manifest.info.files, manifest.entries);
  STRANDLINE_ASSIGN_OR_RETURN(manifest.tree,
                              read_tree(tree, [&](std::string_view kind, const JsonNode& body) {
                                return reader.read(kind, body);
                              }));
  return reader.resolve_aliases(manifest.tree.structure());
}

}  // namespace

Result<std::string> write_manifest(const Manifest& manifest) {
  std::string text;
  STRANDLINE_RETURN_IF_ERROR(append_body(text, manifest));
  text += tail_for(text);
  if (text.size() > kManifestBytesMax) {
    return failure(ErrorCode::kUnsupported,
                   fmt::format("cannot write the manifest: it would take {} bytes, and at most {} "
                               "are allowed: save large plain values as tensors, or fewer tensors",
                               text.size(), kManifestBytesMax));
  }
  return text;
}

Result<Manifest> parse_manifest(std::string_view text) {
  STRANDLINE_RETURN_IF_ERROR(check_frame(text));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonDocument document,
                              JsonDocument::parse(kManifestName, text, kManifestJsonDepthMax));
  const JsonNode node = document.root();
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject root, node.object());
  Manifest manifest;
  STRANDLINE_ASSIGN_OR_RETURN(const FormatVersion version, read_format(root));
  manifest.info.format_major = version.major;
  manifest.info.format_minor = version.minor;
  STRANDLINE_RETURN_IF_ERROR(check_digest_member(root));
  STRANDLINE_RETURN_IF_ERROR(read_numbers(root, manifest.info));
  STRANDLINE_RETURN_IF_ERROR(read_metadata(root, manifest.info));
  STRANDLINE_RETURN_IF_ERROR(read_files(root, manifest.info));
  STRANDLINE_RETURN_IF_ERROR(read_entries(root, manifest));
  return manifest;
}

}  // namespace strandline::format
