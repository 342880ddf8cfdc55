// Notices forks, so that a child does not touch its parent's engine.
#pragma once

#include <cstdint>

namespace strandline::base {

// The number of forks between the process that first called this and the calling process. An
// engine remembers the value at its creation; where it differs the engine belongs to an ancestor:
// its threads do not exist here and its locks may be held for ever.
[[nodiscard]] std::uint64_t fork_generation();

}  // namespace strandline::base
