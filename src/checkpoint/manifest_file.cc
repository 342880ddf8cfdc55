#include "checkpoint/manifest_file.h"

#include <fmt/format.h>

#include <set>
#include <utility>

#include "base/result_macros.h"

namespace strandline::checkpoint {

Error at_file(Error error, const ReadableDirectory& directory, std::string_view name) {
  if (error.path.empty()) error.path = fmt::format("{}/{}", directory.path(), name);
  return error;
}

Result<std::string> read_whole_file(ReadableDirectory& directory, std::string_view name,
                                    std::uint64_t bytes_max) {
  STRANDLINE_ASSIGN_OR_RETURN(const std::uint64_t bytes, directory.file_bytes(name));
  if (bytes > bytes_max) {
    return failure(at_file({.code = ErrorCode::kCorrupt,
                            .message = fmt::format("'{}' has {} bytes where at most {} make sense",
                                                   name, bytes, bytes_max)},
                           directory, name));
  }
  std::string content(bytes, '\0');
  STRANDLINE_RETURN_IF_ERROR(
      directory.read_at(name, 0, std::as_writable_bytes(std::span(content))));
  return content;
}

Result<format::Manifest> read_manifest(ReadableDirectory& directory) {
  STRANDLINE_ASSIGN_OR_RETURN(
      const std::string text,
      read_whole_file(directory, format::kManifestName, format::kManifestBytesMax));
  Result<format::Manifest> manifest = format::parse_manifest(text);
  if (!manifest) {
    return failure(at_file(std::move(manifest).error(), directory, format::kManifestName));
  }
  manifest->info.bytes = text.size();
  for (const FileInfo& file : manifest->info.files) manifest->info.bytes += file.bytes;
  return manifest;
}

std::vector<std::string> files_beside(const CheckpointInfo& info,
                                      const std::vector<std::string>& names) {
  std::set<std::string_view> known{format::kManifestName};
  for (const FileInfo& file : info.files) known.insert(file.name);
  std::vector<std::string> beside;
  for (const std::string& name : names) {
    if (!known.contains(name)) beside.push_back(name);
  }
  return beside;
}

}  // namespace strandline::checkpoint
