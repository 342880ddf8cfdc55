/// @file
/// Start here: a Checkpointer saves the state of a running job in the background and restores it.
///
/// ```cpp
/// auto checkpointer = strandline::Checkpointer::open("checkpoints", {.keep = 3});
/// if (!checkpointer) return report(checkpointer.error());
/// strandline::StateDict state{{"weights", strandline::TensorView::of(weights)}, {"epoch", epoch}};
/// auto save = checkpointer->save(step, state);  // weights may change from here on
/// if (save) auto outcome = save->wait_durable(30s);
/// ```
///
/// The contract, line by line with its tests, stands in docs/guarantees.md.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "strandline/checkpoint.h"
#include "strandline/error.h"
#include "strandline/export.h"
#include "strandline/save.h"
#include "strandline/state_dict.h"
#include "strandline/storage.h"

namespace strandline::inline v0 {

/// What save() does when staging memory is taken by earlier saves.
enum class MemoryPolicy : std::uint8_t {
  /// Wait for them, at most `memory_wait`; then the outcome is failed(kTimeout), as of a save that
  /// failed in the background.
  kWait,
  kSkip,  ///< Skip this save; its outcome says so.
};

/// What save() does about an earlier save that failed in the background. An error that
/// wait_durable() has given counts as handled: it is neither warned of, nor raised, nor one in a
/// row.
enum class ErrorPolicy : std::uint8_t {
  kWarn,   ///< Warn in the next save; fail at the third failure in a row, and in close().
  kRaise,  ///< Fail the next save() with the earlier error, and save nothing in that call.
};

/// Options of a Checkpointer.
struct CheckpointerOptions {
  // ---- Behaviour ----

  /// How many committed checkpoints to keep; the oldest commits go first, never before a newer one
  /// is durable and verified. Default: all.
  std::optional<std::uint32_t> keep = {};
  ErrorPolicy on_error = ErrorPolicy::kWarn;
  MemoryPolicy when_memory_is_full = MemoryPolicy::kWait;
  /// Whether a checkpoint's data is read back and checked before anything older is deleted. Costs a
  /// read of the whole checkpoint. Without it sizes, headers, rank file and manifest are read back.
  bool verify_data = false;
  /// Where the Checkpointer was opened, for the error of a second writer. Default: the program.
  std::string opened_at = {};

  // ---- Performance; the defaults fit most ----

  /// The ceiling of staging memory in bytes. Below the state's size a save streams in waves: it
  /// blocks longer, and says so. Default: two generations of the largest state seen, at most half
  /// of what the host and its memory cgroup have free.
  std::optional<std::uint64_t> host_bytes_max = {};
  /// Threads that help the caller copy. Default: half the cores, between 1 and 8; at most 256.
  std::optional<std::uint32_t> copy_threads = {};
  /// How long a save may wait for earlier saves to free staging memory, and then in each wave for
  /// the wave before it to be written and for a device to finish copying. 0: not at all for earlier
  /// saves; waves and devices then have ten minutes.
  std::chrono::milliseconds memory_wait{std::chrono::minutes(10)};
  /// How long close() waits for saves still running; then it cancels them and fails. restore()
  /// waits as long.
  std::chrono::milliseconds finish_wait{std::chrono::minutes(30)};
};

/// Options of one save.
struct SaveOptions {
  std::map<std::string, double> metrics = {};  ///< Such as {"loss", 0.31}; kept in the manifest.
  StateDict metadata = {};                     ///< Plain values to keep in the manifest.
  bool overwrite = false;                      ///< Replace this step if it is committed already.
  /// More files for the step's directory, name to content, such as `config.json`.
  std::map<std::string, std::string> extra_files = {};
  /// Asked now and then, on the calling thread, while save() waits: for earlier saves, memory, a
  /// device, and in the free function save() for durability. True gives the save up. At the latest
  /// every 100 ms, but not while bytes are copied. It may call anything except save(), restore(),
  /// close() and waits of the same Checkpointer, which fail inside of it; it must not throw.
  std::function<bool()> interrupted = {};
  /// What the adapter took to walk the state; part of `blocked_ms` (adapters only).
  std::chrono::nanoseconds collect_time{0};
};

/// Options of restore().
struct RestoreOptions {
  std::optional<std::int64_t> step = {};  ///< Default: the newest that verifies.
  /// Whether a name on one side only is an error. Without it such names are left alone.
  bool strict = true;
  /// Read everything twice: change nothing until all of it has been verified.
  bool verify_first = false;
  /// Nodes of the state that stand for objects of the caller's (adapters only). An object takes
  /// only the sort of container that it has here, and a list or tuple that holds one, at any depth,
  /// only one of the same length; anything else is kMismatch. Objects inside an object are its own
  /// business, and may be named or not.
  std::vector<std::uint32_t> objects = {};
  /// Asked on the calling thread about the checkpoint that is about to be read, when all else has
  /// been checked and before anything is changed. If it fails, restore() fails with that error;
  /// with kCorrupt it goes on to the next older checkpoint, as on any damage.
  std::function<Status(const Checkpoint& checkpoint)> accept = {};
  /// Where saved tensors go that have no destination; the engine's own memory if null.
  Allocator allocate = {};
  ProgressCallback progress = {};
};

/// What restore() did.
struct Restored {
  std::int64_t step = 0;
  /// The saved tree. Tensors with a destination view it; the others view allocated memory.
  StateDict state;
  /// For each tensor of `state`, the destination's tensor that it was read into, if any.
  std::vector<std::optional<std::uint32_t>> destination;
  std::vector<std::string> missing;     ///< Names only in the destination (`strict` off).
  std::vector<std::string> unexpected;  ///< Names only in the checkpoint (`strict` off).
  std::vector<std::string> warnings;    ///< Newer steps that were skipped, each with its cause.
};

/// Saves and restores the state of one job in one directory of checkpoints.
///
/// Thread-safety: thread-safe; saves are ordered as they were called. One Checkpointer writes a
/// directory at a time (the lock is taken by the first save). Blocking: see each call.
/// After a fork the child's copy is dead: its calls fail with kUnavailable.
class STRANDLINE_EXPORT Checkpointer {
 public:
  /// Opens a directory, which need not exist yet. Creates nothing. Fails with kInvalidArgument.
  [[nodiscard]] static Result<Checkpointer> open(const std::filesystem::path& directory,
                                                 CheckpointerOptions options = {});
  /// The same on a storage of the caller's.
  [[nodiscard]] static Result<Checkpointer> open(std::shared_ptr<Storage> storage,
                                                 CheckpointerOptions options = {});

  /// Closes and drops what close() would have reported.
  ~Checkpointer();
  Checkpointer(Checkpointer&&) noexcept;
  Checkpointer& operator=(Checkpointer&&) noexcept;

  /// Saves `state` as it is now. Blocks until it is copied; what happens to it afterwards cannot
  /// change the checkpoint. Writing goes on in the background.
  ///
  /// `step` means steps completed; >= 0. Fails, saving nothing, with kInvalidArgument or
  /// kUnsupported (a tensor that cannot be saved, with its key path), kAlreadyExists (committed
  /// already), kUnavailable (closed, another writer, or `interrupted`), kIo, kMemoryLimit,
  /// kTimeout (a device, or another thread's save()), or an earlier save's error (see ErrorPolicy).
  /// What goes wrong in the background never fails this call, even if it happens while the call
  /// still copies: the handle's outcome tells.
  [[nodiscard]] Result<Save> save(std::int64_t step, const StateDict& state,
                                  const SaveOptions& options = {});

  /// Restores the newest good checkpoint (or `options.step`) into `state`, in place: tensors are
  /// written through their views, plain values assigned. Returns nothing if no committed
  /// checkpoint exists at all, whatever step was asked for. Names, shapes, dtypes, headers and the
  /// manifest are checked before anything is changed; on damage the next older checkpoint is taken.
  /// Waits for saves of this Checkpointer that are still running, at most `finish_wait`. Blocks.
  ///
  /// Fails with kMismatch (all missing, unexpected and different names are listed), kCorrupt (every
  /// checkpoint is damaged; the causes and the tensors already overwritten are listed), kNotFound
  /// (other steps, but not this one), kInvalidArgument (a destination is read-only or expanded),
  /// kUnsupported (a newer format, or a destination on a device), kIo, kMemoryLimit, kTimeout
  /// (saves that do not end), kUnavailable (closed, or stopped by `progress`).
  [[nodiscard]] Result<std::optional<Restored>> restore(StateDict& state,
                                                        const RestoreOptions& options = {});

  /// The newest committed step by sequence, and all of them, oldest commit first. Blocks (reads
  /// manifests).
  [[nodiscard]] Result<std::optional<std::int64_t>> latest_step() const;
  [[nodiscard]] Result<std::vector<std::int64_t>> steps() const;

  /// Waits until no save is running. Fails with kTimeout; failures of saves are not its business.
  [[nodiscard]] Status wait_until_finished(std::chrono::milliseconds deadline) const;

  /// The errors of all saves that failed in the background and were not yet raised.
  [[nodiscard]] std::vector<Error> failures() const;

  /// Finishes what is running, releases the directory and gives staging memory back. Fails with
  /// what went wrong in the background and was not raised yet (all of it in one error), or with
  /// kTimeout at `finish_wait`: then running saves are cancelled, and the directory is released
  /// when the last of them has ended. Blocks. Idempotent.
  [[nodiscard]] Status close();

  /// The directory, absolute.
  [[nodiscard]] std::string path() const;

  /// The fresh 128-bit id of this Checkpointer, in hex.
  [[nodiscard]] std::string run() const;

  /// Bytes of staging memory that are mapped now, in use or kept for the next save.
  [[nodiscard]] std::uint64_t host_bytes_mapped() const;

 private:
  struct Impl;
  friend struct CheckpointerAccess;  // For tests of the engine, which inject its parts.
  explicit Checkpointer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Saves one checkpoint: `path` becomes a step's directory (step 0), complete and durable when the
/// call returns. Replaces an existing Strandline checkpoint; refuses anything else that is there
/// (kAlreadyExists). Blocks until durable. Errors as Checkpointer::save.
[[nodiscard]] STRANDLINE_EXPORT Status save(const std::filesystem::path& path,
                                            const StateDict& state,
                                            const SaveOptions& options = {});

}  // namespace strandline::inline v0
