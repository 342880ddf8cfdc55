// From staged segments to synced files.
//
// The layout was decided when the state was planned: a segment holds bytes of one file, at the
// offset where they belong, header included. So writing knows nothing about tensors: it cuts
// segments into transfers, keeps a bounded number of them in flight, and syncs each file when its
// last segment is down. A storage may complete transfers on other threads and in any order.
//
// Transfers borrow the segment's memory, so a segment is given back only when all its transfers
// have completed, also on failure. Therefore the writer always drains before it returns.

#include "checkpoint/shard_writer.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "base/mutex.h"
#include "base/no_throw.h"
#include "base/result_macros.h"
#include "format/digest.h"

namespace strandline::checkpoint {
namespace {

// Large enough for any disk to reach its speed, small enough that progress moves.
constexpr std::uint64_t kTransferBytes = 4ull << 20;
// Eight times four MiB keep a fast disk busy; more only takes memory bandwidth from training.
constexpr std::uint32_t kTransfersInFlightMax = 8;

// Counts transfers in flight and keeps the first error.
class Transfers {
 public:
  void start() STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    while (in_flight_ >= kTransfersInFlightMax) changed_.wait(mutex_);
    ++in_flight_;
  }
  void complete(Status status) STRANDLINE_EXCLUDES(mutex_) {
    // Notified under the lock: whoever waits may destroy this object as soon as it sees zero.
    base::MutexLock lock(mutex_);
    --in_flight_;
    if (!status && !error_) error_ = std::move(status).error();
    changed_.notify_all();
  }
  // Waits for all transfers, without a deadline: they read memory that is given back next, and on
  // a disk that hangs nothing bounds a system call.
  [[nodiscard]] Status drain() STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    while (in_flight_ > 0) changed_.wait(mutex_);
    if (error_) return failure(*error_);
    return {};
  }
  [[nodiscard]] bool failed() STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    return error_.has_value();
  }

 private:
  base::Mutex mutex_;
  base::ConditionVariable changed_;
  std::uint32_t in_flight_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  std::optional<Error> error_ STRANDLINE_GUARDED_BY(mutex_);
};

// Of the bytes at [offset, offset + bytes) of a file, how many are tensor data.
std::uint64_t data_bytes_in(std::uint64_t data_start, std::uint64_t offset, std::uint64_t bytes) {
  const std::uint64_t end = offset + bytes;
  return end - std::min(end, std::max(offset, data_start));
}

Status write_segment(WritableFile& file, const staging::FilePlan& plan, std::uint64_t file_offset,
                     std::span<const std::byte> bytes, const WriteObserver& observer) {
  Transfers transfers;
  Status checked;
  for (std::uint64_t at = 0; at < bytes.size() && checked && !transfers.failed();
       at += kTransferBytes) {
    const auto transfer = bytes.subspan(at, std::min(kTransferBytes, bytes.size() - at));
    const std::uint64_t counted =
        data_bytes_in(plan.header.size(), file_offset + at, transfer.size());
    transfers.start();
    // A call that throws is taken as one that was not made: it completes nothing.
    Status begun = base::no_throw("writing a file", [&]() -> Status {
      file.write_at(file_offset + at, transfer, [&transfers, &observer, counted](Status status) {
        if (status) observer.written(counted);
        transfers.complete(std::move(status));
      });
      return {};
    });
    if (!begun) transfers.complete(std::move(begun));
    checked = observer.check();
  }
  STRANDLINE_RETURN_IF_ERROR(transfers.drain());
  return checked;
}

FileInfo describe(const staging::FilePlan& file) {
  FileInfo info;
  info.name = file.name;
  info.bytes = file.file_bytes();
  info.group = file.group;
  info.header_digest = format::digest_of(file.header).hex();
  return info;
}

}  // namespace

Result<std::vector<FileInfo>> ShardWriter::run(staging::Snapshot& snapshot,
                                               PartialDirectory& directory,
                                               const base::Clock& clock,
                                               std::chrono::milliseconds segment_wait,
                                               const WriteObserver& observer) {
  const std::vector<staging::FilePlan>& files = snapshot.plan().files;
  const std::vector<staging::Segment>& segments = snapshot.segments();
  std::vector<FileInfo> written;
  std::unique_ptr<WritableFile> file;
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const staging::Segment& segment = segments[i];
    STRANDLINE_ASSIGN_OR_RETURN(
        const std::span<const std::byte> bytes,
        snapshot.wait_segment(i, base::deadline_after(clock.now(), segment_wait)));
    STRANDLINE_RETURN_IF_ERROR(observer.check());
    if (segment.file_offset == 0) {
      const staging::FilePlan& plan = files[segment.file];
      STRANDLINE_ASSIGN_OR_RETURN(file, directory.create(plan.name, plan.file_bytes()));
    }
    STRANDLINE_RETURN_IF_ERROR(
        write_segment(*file, files[segment.file], segment.file_offset, bytes, observer));
    snapshot.release_segment(i);
    if (segment.file_offset + segment.bytes == files[segment.file].file_bytes()) {
      STRANDLINE_RETURN_IF_ERROR(file->sync());
      file.reset();
      written.push_back(describe(files[segment.file]));
    }
  }
  return written;
}

}  // namespace strandline::checkpoint
