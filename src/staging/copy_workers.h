// The threads that help callers copy.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "base/executor.h"
#include "strandline/error.h"

namespace strandline::staging {

// Copying is bound by memory bandwidth, and no machine's takes more; a larger number is a mistake,
// and would cost a stack for each.
inline constexpr std::uint32_t kCopyThreadsMax = 256;

// Fails with kInvalidArgument on more than kCopyThreadsMax.
[[nodiscard]] Status check_copy_threads(std::optional<std::uint32_t> copy_threads);

// Starts `copy_threads` workers; by default half the cores, between 1 and 8. Null for 0: callers
// copy alone. Fails with kUnavailable where the system gives no more threads.
[[nodiscard]] Result<std::shared_ptr<base::Executor>> start_copy_workers(
    std::optional<std::uint32_t> copy_threads);

}  // namespace strandline::staging
