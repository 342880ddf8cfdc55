/// @file
/// Reading checkpoints: list, inspect, verify, load. Needs no Checkpointer and takes no lock.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "strandline/error.h"
#include "strandline/export.h"
#include "strandline/state_dict.h"
#include "strandline/storage.h"

namespace strandline::inline v0 {

/// A file of a step, as its manifest lists it.
struct FileInfo {
  std::string name;
  std::uint64_t bytes = 0;
  std::string group;          ///< The top-level key whose tensors it holds; empty if none.
  std::uint32_t rank = 0;     ///< The rank that wrote it.
  std::string header_digest;  ///< XXH3-128 in hex: a shard's header, any other file whole.
};

/// Where a saved tensor lies.
struct StoredTensor {
  std::string file;               ///< The shard; for an alias, that of the tensor it aliases.
  std::string name;               ///< The name inside the shard.
  std::uint64_t file_offset = 0;  ///< Of its first byte in the file.
  std::uint64_t bytes = 0;
  std::optional<std::uint32_t> alias_of;  ///< The tensor whose bytes it shares, if it does.
  std::uint64_t alias_offset_bytes = 0;   ///< Where it begins in that tensor's bytes.
};

/// What a manifest says about its step.
struct CheckpointInfo {
  std::int64_t step = 0;
  std::uint64_t sequence = 0;           ///< Newest means highest.
  std::optional<std::uint64_t> parent;  ///< The commit that the state comes from; nothing if none.
  std::string run;                      ///< 128 bits in hex; one per Checkpointer.
  std::uint32_t world = 1;              ///< The number of ranks that wrote it.
  std::int64_t created_ns = 0;          ///< Unix time in nanoseconds.
  std::uint32_t format_major = 0;
  std::uint32_t format_minor = 0;
  std::uint64_t bytes = 0;  ///< Of all files, the manifest included.
  std::vector<FileInfo> files;
  std::map<std::string, double> metrics;
  StateDict metadata;  ///< Plain values that the saver attached.
};

/// One damage that verify() found.
struct Damage {
  std::string file;
  std::string key_path;  ///< The tensor concerned, if one is.
  std::string message;
  /// Not listed in the manifest, so that other programs might take it for a part of the checkpoint;
  /// what the checkpoint itself holds is not affected.
  bool unlisted = false;
  /// Why it does not verify. kIo means that it could not be read, for which the errno tells whether
  /// the medium is at fault or rights and descriptors are.
  ErrorCode code = ErrorCode::kCorrupt;
  int system_errno = 0;  ///< 0 if none.
};

/// Called now and then during long work with bytes done and bytes in all; false stops it, and the
/// call fails with kUnavailable (cancelled).
using ProgressCallback = std::function<bool(std::uint64_t done, std::uint64_t total)>;

/// A read of one tensor into memory of the caller's.
struct TensorRead {
  std::uint32_t tensor = 0;  ///< Index in Structure::tensors().
  TensorView destination;    ///< Same dtype and shape; any strides.
};

/// A committed step, opened for reading. Its manifest, headers and rank files have been checked;
/// the tensors' bytes are checked as they are read.
///
/// Thread-safety: immutable, thread-safe. Copies share what was opened.
class STRANDLINE_EXPORT Checkpoint {
 public:
  /// Opens a step's directory. Fails with kNotFound, kCorrupt (naming the file), kUnsupported (a
  /// newer format), kInvalidArgument (a path that names nothing), kIo or kMemoryLimit. Blocks.
  [[nodiscard]] static Result<Checkpoint> open(const std::filesystem::path& step_directory);
  /// The same of a directory that is open already, on any storage.
  [[nodiscard]] static Result<Checkpoint> open(std::shared_ptr<ReadableDirectory> directory);

  /// What the manifest says about the step. Does not block.
  [[nodiscard]] const CheckpointInfo& info() const;
  /// The directory's path, for messages.
  [[nodiscard]] std::string path() const;

  /// The saved tree and its plain values; the views have no memory.
  [[nodiscard]] const StateDict& tree() const;

  /// Where each tensor lies, in the order of Structure::tensors().
  [[nodiscard]] const std::vector<StoredTensor>& stored() const;

  /// The digests (hex, one per 256 KiB) of a tensor's bytes; of its whole owner for an alias.
  [[nodiscard]] std::vector<std::string> digests(std::uint32_t tensor) const;

  /// Reads tensors, checking each byte's digest before it reaches its destination. Fails with
  /// kCorrupt (naming the tensor), kMismatch (another dtype or shape), kIo, or kUnavailable
  /// (stopped by `progress`). Reads are done in order; after a failure the first `*done` of them
  /// (where given) may have changed their destination, the others have not. Blocks.
  [[nodiscard]] Status read(std::span<const TensorRead> reads,
                            const ProgressCallback& progress = nullptr,
                            std::size_t* done = nullptr) const;

  /// Checks every byte of every file and returns what is damaged, and what lies in the directory
  /// without being listed in the manifest; empty means intact. Fails only if it was stopped
  /// (kUnavailable) or memory ran out. Blocks.
  [[nodiscard]] Result<std::vector<Damage>> verify(
      const ProgressCallback& progress = nullptr) const;

 private:
  struct Impl;
  explicit Checkpoint(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

/// A step found in a directory of checkpoints.
struct StepEntry {
  std::string name;  ///< Of its directory.
  std::int64_t step = 0;
  std::optional<CheckpointInfo> info;  ///< What its manifest says; nothing if it is unreadable.
  std::optional<Error> error;          ///< Why it is unreadable.
};

/// The steps of a directory, oldest commit first; unreadable ones come first of all. Only manifests
/// are read. An absent directory gives kNotFound, one without steps an empty list. Blocks.
[[nodiscard]] STRANDLINE_EXPORT Result<std::vector<StepEntry>> list_checkpoints(
    const std::filesystem::path& directory);

/// Gives memory for tensors that are read but have no destination yet. The views must be row-major,
/// writable and hold their memory alive. Called on the thread of load() or restore().
using Allocator =
    std::function<Result<TensorView>(const Structure& structure, std::uint32_t tensor)>;

/// Options of load().
struct LoadOptions {
  /// The subtrees to load; all if empty. See Structure::find for the text form.
  std::vector<std::variant<std::string, KeyPath>> keys = {};
  /// The step; the newest that verifies if not given. Only for a directory of checkpoints.
  std::optional<std::int64_t> step = {};
  /// Where tensors go; the engine's own memory if null.
  Allocator allocate = {};
  ProgressCallback progress = {};
};

/// What load() gives.
struct Loaded {
  StateDict state;                   ///< The whole tree; tensors outside `roots` have no memory.
  std::vector<std::uint32_t> roots;  ///< The node of each key asked for; the root if none was.
  std::int64_t step = 0;
  std::vector<std::string> warnings;  ///< Newer steps that were skipped, each with its cause.
};

/// Loads from a step's directory, or from the newest good step of a directory of checkpoints.
/// Tensors that were aliases share memory. Nothing is executed. Fails with kNotFound (also for a
/// key), kCorrupt (damage is named; nothing damaged is returned), kUnsupported (a newer format),
/// kInvalidArgument (a path that is a file, or a step and another step asked for), kIo,
/// kMemoryLimit, or kUnavailable (stopped by `progress`). Blocks.
[[nodiscard]] STRANDLINE_EXPORT Result<Loaded> load(const std::filesystem::path& path,
                                                    const LoadOptions& options = {});

}  // namespace strandline::inline v0
