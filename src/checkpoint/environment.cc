#include "checkpoint/environment.h"

#include <sys/random.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <string>
#include <thread>

#include "base/result_macros.h"
#include "base/system_error.h"

namespace strandline::checkpoint {
namespace {

// Copying is bound by memory bandwidth: more threads than this gain nothing, and training wants
// the cores.
constexpr std::uint32_t kCopyThreadsMax = 8;
// The Checkpointer admits four saves at once; one more place lets it post without ever blocking.
constexpr std::size_t kPipelineQueueMax = 8;
// One task per worker and take() at most, and at most four saves at once.
constexpr std::size_t kCopyQueueMax = 64;

}  // namespace

Result<Environment> make_environment(std::optional<std::uint32_t> copy_threads) {
  const std::uint32_t cores = std::max(1u, std::thread::hardware_concurrency());
  const std::uint32_t threads = copy_threads.value_or(std::clamp(cores / 2, 1u, kCopyThreadsMax));
  Environment environment;
  environment.clock = std::make_shared<base::SystemClock>();
  environment.devices = std::make_shared<device::Registry>();
  STRANDLINE_ASSIGN_OR_RETURN(environment.pipeline,
                              base::ThreadExecutor::start(1, kPipelineQueueMax, "strandline-io"));
  if (threads > 0) {
    STRANDLINE_ASSIGN_OR_RETURN(
        environment.copy_workers,
        base::ThreadExecutor::start(threads, kCopyQueueMax, "strandline-copy"));
  }
  return environment;
}

Result<std::string> make_run_id() {
  std::array<unsigned char, 16> bytes{};
  if (::getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    return failure(base::system_error("read random bytes from", "the kernel", errno));
  }
  constexpr char kDigits[] = "0123456789abcdef";
  std::string id;
  for (const unsigned char byte : bytes) {
    id += kDigits[byte >> 4];
    id += kDigits[byte & 15];
  }
  return id;
}

}  // namespace strandline::checkpoint
