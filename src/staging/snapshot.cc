#include "staging/snapshot.h"

#include <utility>

namespace strandline::staging {

Snapshot::Snapshot(std::shared_ptr<const Plan> plan, std::vector<Segment> segments, bool in_waves)
    : plan_(std::move(plan)),
      segments_(std::move(segments)),
      in_waves_(in_waves),
      leases_(segments_.size()),
      filled_(segments_.size(), false),
      released_(segments_.size(), false) {
  if (plan_->layout != Layout::kFile) return;
  digests_.resize(plan_->files.size());
  for (std::size_t file = 0; file < digests_.size(); ++file) {
    for (const PlacedTensor& tensor : plan_->files[file].tensors) {
      digests_[file].emplace_back(format::digest_chunk_count(tensor.bytes));
    }
  }
}

memory::Lease Snapshot::lease(std::size_t index) const {
  base::MutexLock lock(mutex_);
  return leases_[index];
}

Result<std::span<const std::byte>> Snapshot::wait_segment(std::size_t index,
                                                          base::Clock::Instant deadline) {
  base::MutexLock lock(mutex_);
  while (true) {
    if (error_) return failure(*error_);
    if (filled_[index]) {
      return std::span<const std::byte>(leases_[index].data(), leases_[index].bytes());
    }
    if (std::chrono::steady_clock::now() >= deadline) {
      return failure(ErrorCode::kTimeout,
                     "waited in vain for a part of the state to be staged: raise memory_wait, or "
                     "check the device that it is copied from");
    }
    changed_.wait_until(mutex_, deadline);
  }
}

void Snapshot::release_segment(std::size_t index) {
  memory::Lease ended;  // Given back without the lock.
  base::MutexLock lock(mutex_);
  released_[index] = true;
  if (filled_[index]) std::swap(ended, leases_[index]);
}

void Snapshot::abandon(Error error) {
  fail(std::move(error));
  std::vector<memory::Lease> ended(segments_.size());
  base::MutexLock lock(mutex_);
  ended.swap(leases_);
}

const std::vector<format::Digest>& Snapshot::digests(std::uint32_t file,
                                                     std::uint32_t index) const {
  return digests_[file][index];
}

void Snapshot::set_lease(std::size_t index, memory::Lease lease) {
  base::MutexLock lock(mutex_);
  if (!error_) leases_[index] = std::move(lease);
}

void Snapshot::when_ended(std::function<void(const Status&)> ended) {
  Status status;
  {
    base::MutexLock lock(mutex_);
    if (!this->ended()) {
      when_ended_ = std::move(ended);
      return;
    }
    if (error_) status = failure(*error_);
  }
  ended(status);
}

bool Snapshot::wait_ended(base::Clock::Instant deadline) {
  base::MutexLock lock(mutex_);
  while (!ended()) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    changed_.wait_until(mutex_, deadline);
  }
  return true;
}

void Snapshot::set_filled(std::size_t index) {
  std::function<void(const Status&)> when_ended;
  {
    memory::Lease released;  // Given back without the lock, and before anybody hears of the end.
    base::MutexLock lock(mutex_);
    if (error_) return;
    filled_[index] = true;
    ++segments_filled_;
    if (released_[index]) std::swap(released, leases_[index]);
    if (ended()) when_ended.swap(when_ended_);
  }
  changed_.notify_all();
  if (when_ended) when_ended(Status());
}

void Snapshot::set_digest(std::uint32_t file, std::uint32_t index, std::uint64_t chunk,
                          format::Digest digest) {
  digests_[file][index][chunk] = digest;
}

void Snapshot::fail(Error error) {
  std::function<void(const Status&)> when_ended;
  Status status = failure(error);
  {
    std::vector<memory::Lease> unused(segments_.size());  // As in set_filled().
    base::MutexLock lock(mutex_);
    if (error_) return;
    error_ = std::move(error);
    for (std::size_t i = 0; i < segments_.size(); ++i) {
      if (!filled_[i]) std::swap(unused[i], leases_[i]);
    }
    when_ended.swap(when_ended_);
  }
  changed_.notify_all();
  if (when_ended) when_ended(status);
}

Status Snapshot::status() const {
  base::MutexLock lock(mutex_);
  if (error_) return failure(*error_);
  return {};
}

}  // namespace strandline::staging
