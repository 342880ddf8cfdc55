#include "staging/copy_workers.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <thread>

#include "base/result_macros.h"

namespace strandline::staging {
namespace {

// Copying is bound by memory bandwidth: more threads than this gain nothing, and training wants
// the cores.
constexpr std::uint32_t kDefaultCopyThreadsMax = 8;
// One task per worker and take(); the workers of eight takes at once. Beyond it a take waits until
// a worker has begun, which takes no longer than a task of 2 MiB.
constexpr std::size_t kCopyQueueMax = 64;

}  // namespace

Status check_copy_threads(std::optional<std::uint32_t> copy_threads) {
  if (!copy_threads || *copy_threads <= kCopyThreadsMax) return {};
  return failure(ErrorCode::kInvalidArgument,
                 "copy_threads is " + std::to_string(*copy_threads) + "; at most " +
                     std::to_string(kCopyThreadsMax) +
                     " are allowed, and more than the cores gain nothing");
}

Result<std::shared_ptr<base::Executor>> start_copy_workers(
    std::optional<std::uint32_t> copy_threads) {
  const std::uint32_t cores = std::max(1u, std::thread::hardware_concurrency());
  const std::uint32_t threads =
      copy_threads.value_or(std::clamp(cores / 2, 1u, kDefaultCopyThreadsMax));
  if (threads == 0) return std::shared_ptr<base::Executor>();
  STRANDLINE_ASSIGN_OR_RETURN(
      std::shared_ptr<base::Executor> workers,
      base::ThreadExecutor::start(threads, kCopyQueueMax, "strandline-copy"));
  return workers;
}

}  // namespace strandline::staging
