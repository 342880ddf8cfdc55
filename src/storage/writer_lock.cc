// The lock of the one writer.
//
// The lock is a flock(2) on the file ".lock", not the file's existence: the kernel releases it when
// the writer dies by whatever means, so that no restart is ever refused because of a dead process.
// On NFS Linux turns it into a lock that other hosts see too.
//
// The file is never removed. Were it removed at release, this could happen: B has opened it and is
// about to lock; A removes and releases it; B locks the file that has no name any more; C creates a
// new one and locks that. Two writers. (If a person removes the file between our opening and our
// locking it, the look at the name afterwards notices; if later, held() does.)
//
// The file's content tells whoever comes second who holds the lock. It is one line of JSON, written
// after locking, and serves for that message only: nothing is decided by it, so that it may be
// missing, half written or stale.

#include "storage/writer_lock.h"

#include <fcntl.h>
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <simdjson.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>

#include "base/json_engine.h"
#include "base/result_macros.h"
#include "storage/posix_calls.h"
#include "storage/process_lock.h"

namespace strandline::storage {
namespace {

// A file that was removed by hand while we locked it is created again; more than a few times in a
// row, somebody does nothing but remove it.
constexpr int kLockAttemptsMax = 8;

// What is read of the holder's line. Paths are at most 4 KiB.
constexpr std::size_t kHolderBytesMax = 16 << 10;

class FileWriterLock final : public WriterLock {
 public:
  FileWriterLock(ProcessLock lock, std::string path)
      : lock_(std::move(lock)), path_(std::move(path)) {}

  [[nodiscard]] bool held() const override {
    return is_same_file(AT_FDCWD, path_, lock_.descriptor());
  }

 private:
  ProcessLock lock_;
  const std::string path_;  // Absolute, as a storage's path is.
};

struct Holder {
  std::string host;
  std::int64_t pid = 0;
  std::string opened_at;
  std::string since;
};

std::string host_name() {
  std::array<char, 256> name{};
  if (::gethostname(name.data(), name.size() - 1) != 0) return "unknown host";
  return name.data();
}

std::string json_string(std::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      quoted += fmt::format("\\u{:04x}", static_cast<unsigned char>(c));
    } else {
      quoted += c;
    }
  }
  return quoted + '"';
}

// Says who we are. Failure is no reason to give up the lock.
void write_holder(int fd, std::string_view opened_at) {
  const auto now =
      std::chrono::time_point_cast<std::chrono::seconds>(std::chrono::system_clock::now());
  const std::string line = fmt::format(
      "{{\"host\": {}, \"pid\": {}, \"opened_at\": {}, \"since\": \"{:%Y-%m-%dT%H:%M:%SZ}\"}}\n",
      json_string(host_name()), ::getpid(), json_string(opened_at), now);
  // Emptied first, so that a dead holder's line never stands for ours.
  if (::ftruncate(fd, 0) != 0) return;
  static_cast<void>(write_all(fd, 0, std::as_bytes(std::span(line)), std::string(kLockFileName)));
}

std::optional<Holder> read_holder(int root) {
  constexpr int kFlags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
  const base::UniqueFd fd(::openat(root, std::string(kLockFileName).c_str(), kFlags));
  if (!fd) return std::nullopt;
  std::string text(kHolderBytesMax, '\0');
  const ssize_t bytes =
      uninterrupted([&] { return ::pread(fd.get(), text.data(), text.size(), 0); });
  if (bytes <= 0) return std::nullopt;
  text.resize(static_cast<std::size_t>(bytes));

  base::choose_json_engine();
  simdjson::dom::parser parser;
  simdjson::dom::element line;
  std::string_view host;
  std::string_view opened_at;
  std::string_view since;
  std::int64_t pid = 0;
  if (parser.parse(text).get(line) != simdjson::SUCCESS || line["host"].get(host) ||
      line["pid"].get(pid) || line["opened_at"].get(opened_at) || line["since"].get(since)) {
    return std::nullopt;
  }
  return Holder{std::string(host), pid, std::string(opened_at), std::string(since)};
}

Error held_by_another(int root, const std::string& path) {
  std::string who = "another process, which has not said who it is yet";
  std::string remedy = "wait until it ends, or choose another directory";
  if (const std::optional<Holder> holder = read_holder(root)) {
    const bool is_us = holder->pid == ::getpid() && holder->host == host_name();
    who = fmt::format("{}process {} on host {}, opened at {}, writing since {}",
                      is_us ? "this very process: " : "", holder->pid, holder->host,
                      holder->opened_at, holder->since);
    remedy = is_us ? "close the other Checkpointer first, or choose another directory"
                   : "wait until it ends or stop it, or choose another directory";
  }
  return Error{
      .code = ErrorCode::kUnavailable,
      .message = fmt::format("cannot write to '{}': it is being written by {}; {} (the lock ends "
                             "with its process: do not remove '.lock')",
                             path, who, remedy),
      .path = path};
}

}  // namespace

Result<std::unique_ptr<WriterLock>> acquire_writer_lock(int root, const std::string& path,
                                                        std::string_view opened_at) {
  const std::string name(kLockFileName);
  const std::string lock_path = path + '/' + name;
  constexpr int kFlags = O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK;
  for (int attempt = 0; attempt < kLockAttemptsMax; ++attempt) {
    STRANDLINE_ASSIGN_OR_RETURN(std::optional<ProcessLock> lock,
                                ProcessLock::try_acquire(root, name, kFlags, lock_path));
    if (!lock) return failure(held_by_another(root, path));
    if (!is_same_file(root, name, lock->descriptor())) continue;
    write_holder(lock->descriptor(), opened_at);
    return std::make_unique<FileWriterLock>(std::move(*lock), lock_path);
  }
  return failure(Error{.code = ErrorCode::kUnavailable,
                       .message = fmt::format("cannot lock '{}': something keeps removing it; find "
                                              "out what, and try again",
                                              lock_path),
                       .path = lock_path});
}

}  // namespace strandline::storage
