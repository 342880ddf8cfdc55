// How much memory the host and the process's memory cgroups have left.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "strandline/error.h"

namespace strandline::memory {

struct HostMemory {
  std::uint64_t host_bytes_free = 0;    // MemAvailable.
  std::uint64_t cgroup_bytes_free = 0;  // The least over all levels; UINT64_MAX without a limit.
  std::string cgroup;                   // The cgroup directory with the least; empty without one.

  [[nodiscard]] std::uint64_t bytes_free() const {
    return host_bytes_free < cgroup_bytes_free ? host_bytes_free : cgroup_bytes_free;
  }
};

// Reads /proc/meminfo and every level of the process's memory cgroup (v2 `memory.max` and
// `memory.current`, v1 `memory.limit_in_bytes` and `memory.usage_in_bytes`; page cache that can be
// dropped counts as free). `root` stands for "/" in tests. What cannot be read counts as unlimited;
// meminfo must be readable. Thread-safe; blocks for some small reads of /proc.
[[nodiscard]] Result<HostMemory> read_host_memory(const std::filesystem::path& root = "/");

}  // namespace strandline::memory
