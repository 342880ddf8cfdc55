// Destinations that share memory.
//
// A model with tied weights restores two names into the same bytes. That is right as long as both
// names were saved with the same values, and silently wrong otherwise: the last one read would win.
//
// Destinations are sorted by address and cut into clusters of overlapping ranges. Two kinds are
// settled by looking at places alone: members that are the same view, saved as the same bytes (an
// alias, or equal digests); and members without gaps that lie to each other in memory as they lie
// in one file, such as a flat buffer and the parameters that are views of it, so that each shared
// byte comes from one byte of the file. Any other is tried out: every member is read into a scratch
// image of the cluster, then gathered back; a member that does not come back as it was saved was
// overwritten by another one with different values. This is exact for any strides, and only rare
// states pay for it.

#include "checkpoint/overlap.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "base/result_macros.h"
#include "device/host_device.h"

namespace strandline::checkpoint {
namespace {

struct Member {
  std::size_t read = 0;  // Index into the reads.
  const std::byte* begin = nullptr;
  const std::byte* end = nullptr;
};

// Memory of the size that a state asks for; false if there is none.
class Scratch {
 public:
  explicit Scratch(std::uint64_t bytes)
      : memory_(new (std::nothrow) std::byte[bytes]), bytes_(bytes) {}
  explicit operator bool() const { return memory_ != nullptr; }
  [[nodiscard]] std::span<std::byte> bytes() const { return {memory_.get(), bytes_}; }

 private:
  std::unique_ptr<std::byte[]> memory_;
  std::uint64_t bytes_;
};

class OverlapCheck {
 public:
  OverlapCheck(const Checkpoint& checkpoint, const StateDict& destination,
               std::span<const TensorRead> reads, std::span<const std::uint32_t> tensors)
      : checkpoint_(checkpoint), destination_(destination), reads_(reads), tensors_(tensors) {}

  [[nodiscard]] Status run() {
    std::vector<Member> members;
    for (std::size_t i = 0; i < reads_.size(); ++i) {
      const TensorView& view = reads_[i].destination;
      const auto [first, second] = view.reach_bytes();
      if (first != second) members.push_back({i, view.data + first, view.data + second});
    }
    std::sort(members.begin(), members.end(),
              [](const Member& a, const Member& b) { return a.begin < b.begin; });
    for (std::size_t i = 0; i < members.size();) {
      const std::byte* end = members[i].end;
      std::size_t next = i + 1;
      for (; next < members.size() && members[next].begin < end; ++next) {
        end = std::max(end, members[next].end);
      }
      if (next - i > 1) {
        STRANDLINE_RETURN_IF_ERROR(
            check_cluster(std::span<const Member>(members).subspan(i, next - i), end));
      }
      i = next;
    }
    return {};
  }

 private:
  [[nodiscard]] bool saved_equal(std::uint32_t a, std::uint32_t b) const {
    const StoredTensor& left = checkpoint_.stored()[a];
    const StoredTensor& right = checkpoint_.stored()[b];
    if (left.file == right.file && left.file_offset == right.file_offset) return true;
    return !left.alias_of && !right.alias_of && checkpoint_.digests(a) == checkpoint_.digests(b);
  }

  [[nodiscard]] bool settled(std::span<const Member> cluster) const {
    const TensorRead& first = reads_[cluster.front().read];
    return std::all_of(cluster.begin() + 1, cluster.end(), [&](const Member& member) {
      const TensorRead& other = reads_[member.read];
      return other.destination.data == first.destination.data &&
             other.destination.dtype == first.destination.dtype &&
             other.destination.shape == first.destination.shape &&
             other.destination.strides_bytes == first.destination.strides_bytes &&
             other.destination.conjugate == first.destination.conjugate &&
             other.destination.negative == first.destination.negative &&
             saved_equal(first.tensor, other.tensor);
    });
  }

  // Whether memory is a copy of a stretch of one file, whoever reads it.
  [[nodiscard]] bool laid_out_as_saved(std::span<const Member> cluster) const {
    const StoredTensor& first = checkpoint_.stored()[reads_[cluster.front().read].tensor];
    return std::all_of(cluster.begin(), cluster.end(), [&](const Member& member) {
      const TensorView& view = reads_[member.read].destination;
      const StoredTensor& stored = checkpoint_.stored()[reads_[member.read].tensor];
      // Members are sorted by address; a place before the first one wraps around and differs.
      const auto distance = static_cast<std::uint64_t>(member.begin - cluster.front().begin);
      return view.is_row_major() && !view.conjugate && !view.negative &&
             stored.file == first.file && stored.file_offset - first.file_offset == distance;
    });
  }

  // The member's view, moved from the destination into `image`.
  [[nodiscard]] TensorView moved(const Member& member, const std::byte* begin,
                                 std::span<std::byte> image) const {
    TensorView view = reads_[member.read].destination;
    view.data = image.data() + (view.data - begin);
    view.storage_base = image.data();
    view.storage_bytes = image.size();
    return view;
  }

  [[nodiscard]] Status check_cluster(std::span<const Member> cluster, const std::byte* end) {
    if (settled(cluster) || laid_out_as_saved(cluster)) return {};
    const std::byte* begin = cluster.front().begin;
    const auto bytes = static_cast<std::uint64_t>(end - begin);
    const Scratch scratch(bytes);
    if (!scratch) return no_memory(reads_[cluster.front().read].tensor, bytes);
    const std::span<std::byte> image = scratch.bytes();
    std::vector<TensorRead> into_image;
    for (const Member& member : cluster) {
      into_image.push_back({reads_[member.read].tensor, moved(member, begin, image)});
    }
    STRANDLINE_RETURN_IF_ERROR(checkpoint_.read(into_image));
    for (std::size_t i = 0; i < cluster.size(); ++i) {
      STRANDLINE_ASSIGN_OR_RETURN(const bool same, survived(into_image[i]));
      if (!same) return conflict(cluster, i);
    }
    return {};
  }

  // Whether the image still gives what was saved for one member.
  [[nodiscard]] Result<bool> survived(const TensorRead& member) const {
    const std::uint64_t bytes = member.destination.byte_count();
    const Scratch saved(bytes);
    const Scratch image(bytes);
    if (!saved || !image) return no_memory(member.tensor, 2 * bytes);
    const TensorRead again{member.tensor,
                           TensorView::row_major(saved.bytes().data(), member.destination.dtype,
                                                 member.destination.shape)};
    STRANDLINE_RETURN_IF_ERROR(checkpoint_.read({&again, 1}));
    Status gathered;
    device::HostDevice host;
    host.copy_to_host_async(member.destination, 0, image.bytes(),
                            [&](Status status) { gathered = std::move(status); });
    STRANDLINE_RETURN_IF_ERROR(gathered);
    return std::memcmp(saved.bytes().data(), image.bytes().data(), bytes) == 0;
  }

  [[nodiscard]] tl::unexpected<Error> no_memory(std::uint32_t tensor, std::uint64_t bytes) const {
    const Structure& structure = checkpoint_.tree().structure();
    const std::string name = structure.path_text(structure.tensors()[tensor].node);
    return failure(Error{
        .code = ErrorCode::kMemoryLimit,
        .message = fmt::format("'{}' shares memory with other tensors of the state, and there "
                               "is no room for the {} bytes that checking them takes: free "
                               "memory, or restore into tensors that share none",
                               name, bytes),
        .key_path = name});
  }

  [[nodiscard]] Status conflict(std::span<const Member> cluster, std::size_t loser) const {
    const Member& lost = cluster[loser];
    std::size_t winner = loser == 0 ? 1 : 0;
    for (std::size_t i = cluster.size(); i-- > 0;) {
      if (i != loser && cluster[i].begin < lost.end && lost.begin < cluster[i].end) {
        winner = i;
        break;
      }
    }
    const std::string first = name_of(lost);
    const std::string second = name_of(cluster[winner]);
    return failure(
        Error{.code = ErrorCode::kMismatch,
              .message = fmt::format("'{}' and '{}' share memory in the state, but were saved with "
                                     "different values: untie them, or restore only one of them",
                                     first, second),
              .key_path = first});
  }

  [[nodiscard]] std::string name_of(const Member& member) const {
    const Structure& structure = destination_.structure();
    return structure.path_text(structure.tensors()[tensors_[member.read]].node);
  }

  const Checkpoint& checkpoint_;
  const StateDict& destination_;
  const std::span<const TensorRead> reads_;
  const std::span<const std::uint32_t> tensors_;
};

}  // namespace

Status check_overlaps(const Checkpoint& checkpoint, const StateDict& destination,
                      std::span<const TensorRead> reads,
                      std::span<const std::uint32_t> destination_tensors) {
  return OverlapCheck(checkpoint, destination, reads, destination_tensors).run();
}

}  // namespace strandline::checkpoint
