// Brings saved tensors and values back: into a state, or into fresh memory.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "strandline/checkpoint.h"
#include "strandline/checkpointer.h"
#include "strandline/storage.h"

namespace strandline::checkpoint {

struct RestoredFrom {
  Restored restored;
  std::uint64_t sequence = 0;
};

// See Checkpointer::restore. Nothing if there is no committed checkpoint. Blocks.
[[nodiscard]] Result<std::optional<RestoredFrom>> restore_into(Storage& storage, StateDict& state,
                                                               const RestoreOptions& options);

// Where each saved tensor goes, decided before any byte is read.
class Destinations {
 public:
  explicit Destinations(const Checkpoint& checkpoint)
      : checkpoint_(checkpoint),
        state_(checkpoint.tree()),
        placed_(state_.tensors().size(), false) {}

  // A tensor goes into memory of the caller's.
  void set(std::uint32_t tensor, TensorView view);

  // Every tensor for which `wanted` is true and that has no place yet gets memory: aliases share
  // that of their owner, or of another alias that holds their bytes, if it was allocated here too.
  [[nodiscard]] Status allocate(const std::vector<bool>& wanted, const Allocator& allocate);

  [[nodiscard]] const std::vector<TensorRead>& reads() const { return reads_; }
  [[nodiscard]] StateDict& state() { return state_; }

 private:
  [[nodiscard]] Status allocate_one(std::uint32_t tensor, const Allocator& allocate);
  void share(std::uint32_t tensor, std::uint32_t holder);

  const Checkpoint& checkpoint_;
  StateDict state_;
  std::vector<bool> placed_;  // Not told by the view: an empty tensor's memory may be null.
  std::vector<TensorRead> reads_;
};

}  // namespace strandline::checkpoint
