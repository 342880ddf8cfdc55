// Copies segments of a snapshot by several threads, and digests what arrived.
//
// Problem. A state is thousands of small tensors and some of gigabytes. All of it must be copied
// before the caller returns, with every core that is given, on devices that finish at once (the
// host) or later, on a thread of theirs. And when something fails or a deadline passes, the caller
// must be able to leave although a device still writes into staging memory.
//
// Approach. Every stored tensor is cut into pieces: within one digest chunk, so that a piece is
// digested while it is still in the cache, and within one segment. Neighbouring pieces make a task.
// Threads claim tasks under a lock, 2 MiB at a time. A piece is digested from its destination when
// the device has completed it: what is digested is what will be written (extents have no digests,
// because nobody reads them back). Where a segment's border
// cuts a chunk, its digest is left open and goes on in the next segment's job; segments are filled
// one after the other then, so the two pieces never run at once.
//
// Who waits for whom. The caller never waits for a worker that has not begun: a worker that comes
// late finds no task and touches nothing but the job. It does wait for tasks that run, even past
// the deadline: they read memory that the caller is about to give back to its owner, and they end
// by themselves. For devices it waits until the deadline, or leaves it to others to wait for the
// snapshot. A device that completes later finds the job or the snapshot failed: the job holds the
// leases as long as a piece is on its way, so that the memory which is written to cannot be given
// to anybody else. Not longer, and they are dropped before anybody hears of the end: whoever does,
// and finds the memory still taken by a worker that is about to go, would fail for want of it.
//
// Rejected: a task per tensor (one embedding table would keep one core busy), digesting the source
// (a value that changes between the two reads would be stored under a wrong digest), digesting in a
// second pass (everything is read from memory twice).

#include "staging/copy_job.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "base/no_throw.h"

namespace strandline::staging {

using format::kDigestChunkBytes;

CopyJob::CopyJob(std::shared_ptr<Snapshot> snapshot, std::vector<Target> targets, Source source,
                 OpenDigest open)
    : snapshot_(std::move(snapshot)),
      source_(std::move(source)),
      targets_(std::move(targets)),
      open_in_(std::move(open)),
      pieces_left_(targets_.size()) {
  for (std::uint32_t target = 0; target < targets_.size(); ++target) {
    copy_header(targets_[target]);
    const std::size_t before = pieces_.size();
    cut_pieces(target);
    pieces_left_[target] = pieces_.size() - before;
    if (pieces_.size() == before) {
      snapshot_->set_filled(targets_[target].segment);
    } else {
      ++targets_left_;
    }
  }
  cut_tasks();
}

void CopyJob::copy_header(const Target& target) const {
  const Segment& segment = snapshot_->segments()[target.segment];
  const std::string& header = snapshot_->plan().files[segment.file].header;
  if (segment.file_offset >= header.size()) return;
  const std::uint64_t bytes = std::min(segment.bytes, header.size() - segment.file_offset);
  std::memcpy(target.lease.data(), header.data() + segment.file_offset, bytes);
}

void CopyJob::cut_pieces(std::uint32_t target) {
  const Segment& segment = snapshot_->segments()[targets_[target].segment];
  const FilePlan& file = snapshot_->plan().files[segment.file];
  const std::uint64_t data_start = file.header.size();
  const std::uint64_t segment_end = segment.file_offset + segment.bytes;
  if (segment_end <= data_start) return;
  // The part of the data section that lies in the segment.
  const std::uint64_t from = segment.file_offset - std::min(segment.file_offset, data_start);
  const std::uint64_t to = segment_end - data_start;
  auto tensor = std::partition_point(
      file.tensors.begin(), file.tensors.end(),
      [from](const PlacedTensor& each) { return each.offset + each.bytes <= from; });
  for (; tensor != file.tensors.end() && tensor->offset < to; ++tensor) {
    const auto index = static_cast<std::uint32_t>(tensor - file.tensors.begin());
    std::uint64_t begin = std::max(from, tensor->offset) - tensor->offset;
    const std::uint64_t end = std::min(to - tensor->offset, tensor->bytes);
    while (begin < end) {
      const std::uint64_t chunk_end = (begin / kDigestChunkBytes + 1) * kDigestChunkBytes;
      const std::uint64_t bytes = std::min(chunk_end, end) - begin;
      pieces_.push_back(
          {.target = target, .file = segment.file, .index = index, .begin = begin, .bytes = bytes});
      begin += bytes;
    }
  }
}

void CopyJob::cut_tasks() {
  std::uint64_t bytes = 0;
  std::size_t count = 0;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    bytes += pieces_[i].bytes;
    ++count;
    if (bytes >= kCopyTaskBytes || count >= kCopyTaskPieces || i + 1 == pieces_.size()) {
      task_ends_.push_back(i + 1);
      bytes = 0;
      count = 0;
    }
  }
}

std::span<std::byte> CopyJob::memory_of(const Piece& piece) const {
  const Target& target = targets_[piece.target];
  const Segment& segment = snapshot_->segments()[target.segment];
  const std::uint64_t file_offset =
      snapshot_->plan().files[piece.file].header.size() + placed(piece).offset + piece.begin;
  return {target.lease.data() + (file_offset - segment.file_offset), piece.bytes};
}

const PlacedTensor& CopyJob::placed(const Piece& piece) const {
  return snapshot_->plan().files[piece.file].tensors[piece.index];
}

const TensorView& CopyJob::source_of(const Piece& piece) const {
  // With kStorage there is one file, whose tensors are the extents.
  const bool extent = snapshot_->plan().layout == Layout::kStorage;
  return source_.views[extent ? piece.index : placed(piece).tensor];
}

void CopyJob::help() {
  while (true) {
    std::size_t task = 0;
    {
      base::MutexLock lock(mutex_);
      if (error_ || next_task_ == task_ends_.size()) return;
      task = next_task_++;
      ++running_;
    }
    for (std::size_t i = task == 0 ? 0 : task_ends_[task - 1]; i < task_ends_[task]; ++i) {
      if (failed_.load()) break;
      start(i);
    }
    base::MutexLock lock(mutex_);
    if (--running_ == 0) changed_.notify_all();
  }
}

void CopyJob::start(std::size_t piece_index) {
  const Piece& piece = pieces_[piece_index];
  const TensorView& view = source_of(piece);
  Device* const device = source_.devices->find(view.device.kind);
  Status started = base::no_throw("copying it", [&]() -> Status {
    uses_.fetch_add(1);
    device->copy_to_host_async(
        view, piece.begin, memory_of(piece),
        [self = shared_from_this(), keep_alive = view.keep_alive, piece_index](Status status) {
          self->done(piece_index, std::move(status));
        });
    return {};
  });
  if (!started) done(piece_index, std::move(started));
}

void CopyJob::done(std::size_t piece_index, Status status) {
  const Piece& piece = pieces_[piece_index];
  const bool arrived = status && !failed_.load();
  if (arrived) {
    if (snapshot_->plan().layout == Layout::kFile) digest(piece);
    snapshot_->add_bytes_staged(piece.bytes);
  }
  end_use();  // Before anybody hears of the end: whoever does may want the memory at once.
  if (!status) return fail(with_name(piece, std::move(status).error()));
  if (!arrived || pieces_left_[piece.target].fetch_sub(1) != 1) return;
  snapshot_->set_filled(targets_[piece.target].segment);
  base::MutexLock lock(mutex_);
  if (--targets_left_ == 0) changed_.notify_all();
}

Error CopyJob::with_name(const Piece& piece, Error error) const {
  const std::string name =
      source_.structure->path_text(source_.structure->tensors()[placed(piece).tensor].node);
  if (error.key_path.empty()) error.key_path = name;
  error.message = "cannot copy '" + name + "': " + error.message;
  return error;
}

void CopyJob::end_use() {
  if (uses_.fetch_sub(1) != 1) return;
  for (Target& target : targets_) target.lease = {};
}

void CopyJob::digest(const Piece& piece) {
  const std::uint64_t end = piece.begin + piece.bytes;
  const bool begins = piece.begin % kDigestChunkBytes == 0;
  const bool ends = end % kDigestChunkBytes == 0 || end == placed(piece).bytes;
  const std::uint64_t chunk = piece.begin / kDigestChunkBytes;
  const std::span<const std::byte> bytes = memory_of(piece);
  if (begins && ends) {
    snapshot_->set_digest(piece.file, piece.index, chunk, format::digest_of(bytes));
    return;
  }
  format::DigestStream stream = begins ? format::DigestStream() : *std::move(open_in_);
  stream.update(bytes);
  if (ends) {
    snapshot_->set_digest(piece.file, piece.index, chunk, stream.finish());
  } else {
    open_out_ = std::move(stream);
  }
}

void CopyJob::fail(Error error) {
  {
    base::MutexLock lock(mutex_);
    if (error_) return;
    error_ = error;
    failed_.store(true);
    changed_.notify_all();
    if (!left_) return;
  }
  snapshot_->fail(std::move(error));
}

Status CopyJob::wait(base::Wait& patience) {
  Status status = wait_for_targets(patience);
  end_use();
  return status;
}

Status CopyJob::wait_for_targets(base::Wait& patience) {
  base::MutexLock lock(mutex_);
  while (running_ > 0 || (!error_ && targets_left_ > 0)) {
    if (running_ > 0) {
      changed_.wait(mutex_);
      continue;
    }
    Status end;
    if (patience.expired()) {
      end = failure(ErrorCode::kTimeout, kDeviceTooSlow);
    } else {
      end = patience.pause(changed_, mutex_);
    }
    if (!end && !error_ && targets_left_ > 0) {
      error_ = std::move(end).error();
      failed_.store(true);
    }
  }
  if (error_) return failure(*error_);
  return {};
}

void CopyJob::leave() {
  std::optional<Error> error;
  {
    base::MutexLock lock(mutex_);
    while (running_ > 0) changed_.wait(mutex_);
    left_ = true;
    error = error_;
  }
  end_use();
  if (error) snapshot_->fail(*std::move(error));
}

}  // namespace strandline::staging
