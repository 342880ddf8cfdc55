#include "checkpoint/environment.h"

#include <sys/random.h>

#include <array>
#include <cerrno>
#include <string>

#include "base/result_macros.h"
#include "base/system_error.h"
#include "staging/copy_workers.h"

namespace strandline::checkpoint {
namespace {

// The Checkpointer admits four saves at once; one more place lets it post without ever blocking.
constexpr std::size_t kPipelineQueueMax = 8;

}  // namespace

Result<Environment> make_environment(std::optional<std::uint32_t> copy_threads) {
  Environment environment;
  environment.clock = std::make_shared<base::SystemClock>();
  environment.devices = std::make_shared<device::Registry>();
  STRANDLINE_ASSIGN_OR_RETURN(environment.pipeline,
                              base::ThreadExecutor::start(1, kPipelineQueueMax, "strandline-io"));
  STRANDLINE_ASSIGN_OR_RETURN(environment.copy_workers, staging::start_copy_workers(copy_threads));
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
