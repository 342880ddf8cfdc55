// A committed step, opened for reading.
//
// Opening checks everything but the tensors' data: the manifest by its own digest, every other file
// by size, the heads of shards and the whole of all other files by the digests in the manifest, and
// that tree, shards and rank files tell the same story. Data is checked chunk by chunk as it is
// read. So no byte of a step is ever believed unchecked.

#include "strandline/checkpoint.h"

#include <fmt/format.h>

#include <array>
#include <set>
#include <unordered_map>
#include <utility>

#include "base/no_throw.h"
#include "base/result_macros.h"
#include "checkpoint/manifest_file.h"
#include "checkpoint/step_path.h"
#include "checkpoint/tensor_reader.h"
#include "device/host_device.h"
#include "format/digest.h"
#include "format/manifest.h"
#include "format/names.h"
#include "format/rank_file.h"
#include "format/safetensors.h"

namespace strandline::inline v0 {
namespace {

using checkpoint::at_file;
using checkpoint::TensorSource;

// Index and configuration files are small; this bounds what a hostile manifest can make us read.
constexpr std::uint64_t kSmallFileBytesMax = 64ull << 20;

constexpr std::string_view kShardSuffix = ".safetensors";

bool is_shard(const FileInfo& file) { return file.name.ends_with(kShardSuffix); }

bool is_rank_file(const FileInfo& file) { return file.name == format::rank_file_name(file.rank); }

Error damaged(const ReadableDirectory& directory, const std::string& file, std::string message) {
  return at_file({.code = ErrorCode::kCorrupt, .message = std::move(message)}, directory, file);
}

}  // namespace

struct Checkpoint::Impl {
  // A tensor in a shard, by name.
  struct ShardEntry {
    format::ShardTensor tensor;
    std::uint64_t data_start = 0;
    std::vector<format::Digest> digests;
    bool in_tree = false;
  };
  using Shard = std::unordered_map<std::string, ShardEntry>;

  std::shared_ptr<ReadableDirectory> directory;
  format::Manifest manifest;
  std::unordered_map<std::string, Shard> shards;
  std::vector<StoredTensor> stored;
  std::vector<const std::vector<format::Digest>*> digests;  // Per tensor; the owner's for aliases.

  [[nodiscard]] Status open_files();
  [[nodiscard]] Status open_file(const FileInfo& file);
  [[nodiscard]] Status open_shard(const FileInfo& file);
  [[nodiscard]] Status open_rank_file(const FileInfo& file, const std::string& content);
  [[nodiscard]] Status connect();
  [[nodiscard]] Status connect_tensor(std::uint32_t tensor);
  void find_strangers(std::vector<Damage>& damages) const;
  [[nodiscard]] TensorSource source(std::uint32_t tensor) const;
  [[nodiscard]] Status read_one(const TensorRead& read, std::vector<std::byte>& buffer,
                                bool& touched,
                                const std::function<Status(std::uint64_t)>& advance) const;
  [[nodiscard]] Status read(std::span<const TensorRead> reads, const ProgressCallback& progress,
                            std::size_t* done) const;
  [[nodiscard]] Result<std::vector<Damage>> verify(const ProgressCallback& progress) const;
  [[nodiscard]] std::string tensor_path(std::uint32_t tensor) const {
    return manifest.tree.structure().path_text(manifest.tree.structure().tensors()[tensor].node);
  }
};

Status Checkpoint::Impl::open_shard(const FileInfo& file) {
  std::array<std::byte, 8> prefix{};
  if (file.bytes < prefix.size()) {
    return failure(damaged(*directory, file.name, "the shard is too short to be one"));
  }
  STRANDLINE_RETURN_IF_ERROR(directory->read_at(file.name, 0, prefix));
  const auto data_start = format::safetensors_data_start(prefix, file.bytes);
  if (!data_start) return failure(at_file(data_start.error(), *directory, file.name));
  std::vector<std::byte> head(*data_start);
  STRANDLINE_RETURN_IF_ERROR(directory->read_at(file.name, 0, head));
  if (format::digest_of(head).hex() != file.header_digest) {
    return failure(damaged(*directory, file.name,
                           "the header does not have the digest that it was written with"));
  }
  auto header = format::parse_safetensors_header(head, file.bytes);
  if (!header) return failure(at_file(std::move(header).error(), *directory, file.name));
  Shard& shard = shards[file.name];
  for (format::ShardTensor& tensor : header->tensors) {
    std::string name = tensor.name;
    shard.emplace(std::move(name), ShardEntry{std::move(tensor), *data_start, {}, false});
  }
  return {};
}

Status Checkpoint::Impl::open_rank_file(const FileInfo& file, const std::string& content) {
  auto parsed = format::parse_rank_file(content);
  if (!parsed) return failure(at_file(std::move(parsed).error(), *directory, file.name));
  if (parsed->run != manifest.info.run || parsed->step != manifest.info.step ||
      parsed->rank != file.rank) {
    return failure(damaged(*directory, file.name, "the rank file belongs to another save"));
  }
  for (format::RankFile::Shard& shard : parsed->shards) {
    const auto known = shards.find(shard.name);
    if (known == shards.end()) {
      return failure(damaged(
          *directory, file.name,
          fmt::format("it names the shard '{}', which the step does not have", shard.name)));
    }
    for (format::RankFile::Tensor& tensor : shard.tensors) {
      const auto entry = known->second.find(tensor.name);
      if (entry == known->second.end() ||
          entry->second.tensor.end - entry->second.tensor.begin != tensor.bytes) {
        return failure(damaged(
            *directory, file.name,
            fmt::format("its tensor '{}' is not that of shard '{}'", tensor.name, shard.name)));
      }
      entry->second.digests = std::move(tensor.digests);
    }
  }
  return {};
}

Status Checkpoint::Impl::open_file(const FileInfo& file) {
  const Result<std::uint64_t> found = directory->file_bytes(file.name);
  if (!found && found.error().code == ErrorCode::kNotFound) {
    return failure(damaged(*directory, file.name,
                           fmt::format("'{}' is missing, or is no plain file", file.name)));
  }
  STRANDLINE_ASSIGN_OR_RETURN(const std::uint64_t bytes, found);
  if (bytes != file.bytes) {
    return failure(damaged(
        *directory, file.name,
        fmt::format("'{}' has {} bytes, but {} were written", file.name, bytes, file.bytes)));
  }
  if (is_shard(file)) return open_shard(file);
  const std::uint64_t bytes_max =
      is_rank_file(file) ? format::kRankFileBytesMax : kSmallFileBytesMax;
  STRANDLINE_ASSIGN_OR_RETURN(const std::string content,
                              checkpoint::read_whole_file(*directory, file.name, bytes_max));
  if (format::digest_of(content).hex() != file.header_digest) {
    return failure(
        damaged(*directory, file.name,
                fmt::format("'{}' does not have the digest that it was written with", file.name)));
  }
  return is_rank_file(file) ? open_rank_file(file, content) : Status();
}

Status Checkpoint::Impl::connect_tensor(std::uint32_t tensor) {
  const format::TensorEntry& entry = manifest.entries[tensor];
  const Structure::Tensor& saved = manifest.tree.structure().tensors()[tensor];
  StoredTensor& place = stored[tensor];
  if (entry.alias) {
    const StoredTensor& owner = stored[entry.alias->tensor];
    place = owner;
    place.alias_of = entry.alias->tensor;
    place.alias_offset_bytes = entry.alias->offset_bytes;
    place.file_offset += entry.alias->offset_bytes;
    place.bytes = saved.byte_count();
    digests[tensor] = digests[entry.alias->tensor];
    return {};
  }
  const format::TensorPart& part = entry.parts.front();
  const auto shard = shards.find(part.file);
  const auto found = shard == shards.end() ? Shard::iterator() : shard->second.find(part.name);
  if (shard == shards.end() || found == shard->second.end()) {
    return failure(damaged(*directory, part.file,
                           fmt::format("'{}' has no tensor '{}' (the manifest's '{}')", part.file,
                                       part.name, tensor_path(tensor))));
  }
  ShardEntry& held = found->second;
  held.in_tree = true;
  if (held.tensor.dtype != saved.dtype || held.tensor.shape != saved.shape) {
    return failure(damaged(*directory, part.file,
                           fmt::format("the tensor '{}' has another dtype or shape than the "
                                       "manifest says",
                                       part.name)));
  }
  place.file = part.file;
  place.name = part.name;
  place.file_offset = held.data_start + held.tensor.begin;
  place.bytes = held.tensor.end - held.tensor.begin;
  if (held.digests.size() != format::digest_chunk_count(place.bytes)) {
    return failure(damaged(*directory, part.file,
                           fmt::format("no rank file has the digests of tensor '{}'", part.name)));
  }
  digests[tensor] = &held.digests;
  return {};
}

Status Checkpoint::Impl::connect() {
  stored.resize(manifest.entries.size());
  digests.resize(manifest.entries.size());
  // Owners first: aliases copy from them.
  for (const bool aliases : {false, true}) {
    for (std::uint32_t i = 0; i < stored.size(); ++i) {
      if (manifest.entries[i].alias.has_value() != aliases) continue;
      STRANDLINE_RETURN_IF_ERROR(connect_tensor(i));
    }
  }
  // Bytes that the tree does not reach would never be verified.
  for (const auto& [file, shard] : shards) {
    for (const auto& [name, entry] : shard) {
      if (entry.in_tree) continue;
      return failure(damaged(*directory, file,
                             fmt::format("the manifest does not know the tensor '{}'", name)));
    }
  }
  return {};
}

TensorSource Checkpoint::Impl::source(std::uint32_t tensor) const {
  const std::uint32_t owner = stored[tensor].alias_of.value_or(tensor);
  return {stored[owner].file, stored[owner].file_offset, stored[owner].bytes, digests[owner]};
}

Status Checkpoint::Impl::open_files() {
  STRANDLINE_ASSIGN_OR_RETURN(manifest, checkpoint::read_manifest(*directory));
  // Shards first: rank files speak about them.
  for (const bool want_shards : {true, false}) {
    for (const FileInfo& file : manifest.info.files) {
      if (is_shard(file) != want_shards) continue;
      STRANDLINE_RETURN_IF_ERROR(open_file(file));
    }
  }
  return connect();
}

Result<Checkpoint> Checkpoint::open(const std::filesystem::path& step_directory) {
  std::error_code error;
  // From within: "." and ".." name a step too.
  const std::filesystem::path name = step_directory.filename();
  const bool dots = name == "." || name == "..";
  STRANDLINE_ASSIGN_OR_RETURN(
      const checkpoint::StepPath step,
      checkpoint::split_step_path(dots ? std::filesystem::canonical(step_directory, error)
                                       : step_directory));
  STRANDLINE_ASSIGN_OR_RETURN(auto directory, checkpoint::open_step(step));
  return open(std::move(directory));
}

Result<Checkpoint> Checkpoint::open(std::shared_ptr<ReadableDirectory> directory) {
  return base::no_throw("opening a checkpoint", [&]() -> Result<Checkpoint> {
    auto impl = std::make_shared<Impl>();
    impl->directory = std::move(directory);
    STRANDLINE_RETURN_IF_ERROR(impl->open_files());
    return Checkpoint(std::move(impl));
  });
}

const CheckpointInfo& Checkpoint::info() const { return impl_->manifest.info; }
std::string Checkpoint::path() const { return impl_->directory->path(); }
const StateDict& Checkpoint::tree() const { return impl_->manifest.tree; }
const std::vector<StoredTensor>& Checkpoint::stored() const { return impl_->stored; }

std::vector<std::string> Checkpoint::digests(std::uint32_t tensor) const {
  std::vector<std::string> digests;
  for (const format::Digest& digest : *impl_->digests[tensor]) digests.push_back(digest.hex());
  return digests;
}

Status Checkpoint::Impl::read_one(const TensorRead& read, std::vector<std::byte>& buffer,
                                  bool& touched,
                                  const std::function<Status(std::uint64_t)>& advance) const {
  const Structure::Tensor& saved = manifest.tree.structure().tensors()[read.tensor];
  if (read.destination.dtype != saved.dtype || read.destination.shape != saved.shape) {
    return failure(ErrorCode::kMismatch, "the destination has another dtype or shape");
  }
  STRANDLINE_RETURN_IF_ERROR(read.destination.check());
  if (read.destination.device.kind != DeviceId{}.kind) {
    return failure(ErrorCode::kUnsupported, "the destination is not in host memory");
  }
  device::HostDevice host;
  return checkpoint::read_checked(
      *directory, source(read.tensor), stored[read.tensor].alias_offset_bytes,
      stored[read.tensor].bytes, buffer,
      [&](std::uint64_t offset, std::span<const std::byte> bytes) -> Status {
        touched = true;
        Status copied;
        host.copy_from_host_async(bytes, read.destination, offset,
                                  [&](Status status) { copied = std::move(status); });
        STRANDLINE_RETURN_IF_ERROR(copied);
        return advance(bytes.size());
      });
}

Status Checkpoint::Impl::read(std::span<const TensorRead> reads, const ProgressCallback& progress,
                              std::size_t* done) const {
  std::uint64_t total = 0;
  for (const TensorRead& each : reads) total += stored[each.tensor].bytes;
  std::uint64_t finished = 0;
  std::vector<std::byte> buffer;
  if (done != nullptr) *done = 0;
  for (std::size_t i = 0; i < reads.size(); ++i) {
    const TensorRead& one = reads[i];
    bool touched = false;
    Status status = read_one(one, buffer, touched, [&](std::uint64_t bytes) -> Status {
      finished += bytes;
      if (!progress || progress(finished, total)) return {};
      return failure(ErrorCode::kUnavailable, "reading was stopped by the caller");
    });
    if ((touched || status) && done != nullptr) *done = i + 1;
    if (status) continue;
    Error error = at_file(std::move(status).error(), *directory, stored[one.tensor].file);
    error.key_path = tensor_path(one.tensor);
    if (error.code == ErrorCode::kNotFound) error.code = ErrorCode::kCorrupt;
    error.message = fmt::format("cannot read tensor '{}': {}", error.key_path, error.message);
    return failure(std::move(error));
  }
  return {};
}

Status Checkpoint::read(std::span<const TensorRead> reads, const ProgressCallback& progress,
                        std::size_t* done) const {
  return base::no_throw("reading tensors", [&] { return impl_->read(reads, progress, done); });
}

// Everything in the directory that the manifest does not list. Other programs might read it, and
// take it for a part of the checkpoint.
void Checkpoint::Impl::find_strangers(std::vector<Damage>& damages) const {
  const Result<std::vector<std::string>> names = directory->list();
  if (!names) {
    damages.push_back({.file = {},
                       .key_path = {},
                       .message = names.error().message,
                       .code = names.error().code,
                       .system_errno = names.error().system_errno});
    return;
  }
  for (const std::string& name : checkpoint::files_beside(manifest.info, *names)) {
    damages.push_back({.file = name,
                       .key_path = {},
                       .message = fmt::format("'{}' is not in the manifest", name),
                       .unlisted = true});
  }
}

Result<std::vector<Damage>> Checkpoint::Impl::verify(const ProgressCallback& progress) const {
  std::vector<Damage> damages;
  std::uint64_t finished = 0;
  std::vector<std::byte> buffer;
  // What open() checked may have changed since.
  const Result<Checkpoint> again = Checkpoint::open(directory);
  if (!again) {
    if (again.error().code == ErrorCode::kMemoryLimit) return failure(again.error());
    damages.push_back({.file = std::filesystem::path(again.error().path).filename().string(),
                       .key_path = again.error().key_path,
                       .message = again.error().message,
                       .code = again.error().code,
                       .system_errno = again.error().system_errno});
  }
  find_strangers(damages);
  std::uint64_t total = 0;
  for (const StoredTensor& each : stored) total += each.alias_of ? 0 : each.bytes;
  for (std::uint32_t i = 0; i < stored.size(); ++i) {
    if (stored[i].alias_of) continue;
    bool stopped = false;
    const Status status = checkpoint::read_checked(
        *directory, source(i), 0, stored[i].bytes, buffer,
        [&](std::uint64_t, std::span<const std::byte> bytes) -> Status {
          finished += bytes.size();
          stopped = progress && !progress(finished, total);
          if (!stopped) return {};
          return failure(ErrorCode::kUnavailable, "verifying was stopped by the caller");
        });
    if (stopped) return failure(status.error());
    if (!status) {
      damages.push_back({.file = stored[i].file,
                         .key_path = tensor_path(i),
                         .message = status.error().message,
                         .code = status.error().code,
                         .system_errno = status.error().system_errno});
    }
  }
  return damages;
}

Result<std::vector<Damage>> Checkpoint::verify(const ProgressCallback& progress) const {
  return base::no_throw("verifying", [&] { return impl_->verify(progress); });
}

}  // namespace strandline::inline v0
