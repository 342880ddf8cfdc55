#include "base/fork.h"

#include <pthread.h>

#include <atomic>

namespace strandline::base {
namespace {

constinit std::atomic<std::uint64_t> generation{0};

}  // namespace

std::uint64_t fork_generation() {
  [[maybe_unused]] static const int kRegistered =
      pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1, std::memory_order_relaxed); });
  return generation.load(std::memory_order_relaxed);
}

}  // namespace strandline::base
