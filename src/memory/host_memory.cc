// How much memory may still be taken without the kernel killing somebody.
//
// Two limits apply at once. The host has MemAvailable: what can be had without swapping, page cache
// that can be dropped included. And every memory cgroup from the process's own up to the top may
// have a limit; the least of what they leave counts, because a container's limit often sits one or
// two levels above the process. Machines have cgroup v1, v2, or both mounted at once (then the
// memory controller lives in one of them), so both are read and what is missing limits nothing.
//
// A cgroup's usage contains the page cache that its processes filled, checkpoints just written
// included. Taken literally, `limit - usage` would be almost nothing soon after a few saves, and a
// slab would refuse to grow although the kernel drops that cache as soon as somebody asks. So
// inactive file pages count as free, exactly as MemAvailable and the usual "working set" count
// them.
//
// Where a hierarchy is mounted comes from /proc/self/mountinfo. Inside a container the mount's
// root may already be the container's cgroup ("/docker/abc" mounted at /sys/fs/cgroup/memory): then
// that prefix is taken off the process's path before it is looked for below the mount point.

#include "memory/host_memory.h"

#include <charconv>
#include <fstream>
#include <iterator>
#include <limits>
#include <optional>
#include <sstream>
#include <string_view>
#include <vector>

namespace strandline::memory {
namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

struct Mount {
  std::string root;   // What of the hierarchy is mounted.
  std::string point;  // Where.
};

struct Hierarchy {
  bool v2 = false;
  std::string path;  // Of the process, in the hierarchy.
  std::optional<Mount> mount;
};

std::optional<std::string> read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) return std::nullopt;
  return text;
}

std::optional<std::uint64_t> parse_number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end == text.data()) return std::nullopt;
  return value;
}

// The number after `name` at the start of a line, as in "MemAvailable:   123 kB".
std::optional<std::uint64_t> find_number(std::string_view text, std::string_view name) {
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    std::string_view line = text.substr(0, end);
    text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
    if (!line.starts_with(name)) continue;
    line.remove_prefix(name.size());
    const std::size_t digits = line.find_first_not_of(" \t:");
    if (digits == 0 || digits == std::string_view::npos) continue;  // A longer name, or nothing.
    return parse_number(line.substr(digits));
  }
  return std::nullopt;
}

bool lists(std::string_view comma_separated, std::string_view word) {
  while (true) {
    const std::size_t comma = comma_separated.find(',');
    if (comma_separated.substr(0, comma) == word) return true;
    if (comma == std::string_view::npos) return false;
    comma_separated.remove_prefix(comma + 1);
  }
}

// The kernel writes blanks in mount points as three octal digits.
std::string unescape(std::string_view text) {
  const auto digit = [](char c) { return c >= '0' && c <= '7'; };
  std::string plain;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 3 < text.size() && digit(text[i + 1]) && digit(text[i + 2]) &&
        digit(text[i + 3])) {
      plain += static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 +
                                 (text[i + 3] - '0'));
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

// The process's place in the v1 memory hierarchy and in the v2 hierarchy, from lines like
// "4:memory:/a/b" and "0::/a/b".
std::vector<Hierarchy> parse_cgroups(const std::string& text) {
  std::vector<Hierarchy> found;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string_view controllers =
        std::string_view(line).substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && !lists(controllers, "memory")) continue;
    found.push_back({.v2 = v2, .path = line.substr(second + 1), .mount = std::nullopt});
  }
  return found;
}

// Where the hierarchies are mounted, from lines like
// "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory".
void find_mounts(const std::string& text, std::vector<Hierarchy>& hierarchies) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t separator = line.find(" - ");
    if (separator == std::string::npos) continue;
    std::istringstream left(line.substr(0, separator));
    std::istringstream right(line.substr(separator + 3));
    std::string id, parent, device, root, point, type, source, options;
    left >> id >> parent >> device >> root >> point;
    right >> type >> source >> options;
    for (Hierarchy& hierarchy : hierarchies) {
      const bool matches =
          hierarchy.v2 ? type == "cgroup2" : type == "cgroup" && lists(options, "memory");
      if (matches && !hierarchy.mount) hierarchy.mount = Mount{unescape(root), unescape(point)};
    }
  }
}

// The process's path below the mount point; empty for the mount point itself.
std::string path_below_mount(const Hierarchy& hierarchy) {
  std::string path = hierarchy.path;
  const std::string& mounted = hierarchy.mount->root;
  if (mounted != "/" && path.starts_with(mounted) &&
      (path.size() == mounted.size() || path[mounted.size()] == '/')) {
    path.erase(0, mounted.size());
  }
  while (!path.empty() && path.back() == '/') path.pop_back();
  // A path out of the namespace ("/../x") names what cannot be seen from here.
  if (path.find("/..") != std::string::npos) return "";
  return path;
}

// What one level leaves; kUnlimited where it limits nothing or cannot be read.
std::uint64_t bytes_free_at(const std::filesystem::path& directory, bool v2) {
  const auto limit_text = read_text(directory / (v2 ? "memory.max" : "memory.limit_in_bytes"));
  const auto usage_text = read_text(directory / (v2 ? "memory.current" : "memory.usage_in_bytes"));
  if (!limit_text || !usage_text) return kUnlimited;
  const auto limit = parse_number(*limit_text);  // Not a number: "max".
  const auto usage = parse_number(*usage_text);
  if (!limit || !usage) return kUnlimited;
  const std::string stat = read_text(directory / "memory.stat").value_or("");
  const std::uint64_t droppable =
      find_number(stat, v2 ? "inactive_file" : "total_inactive_file").value_or(0);
  const std::uint64_t kept = *usage > droppable ? *usage - droppable : 0;
  return *limit > kept ? *limit - kept : 0;
}

void visit_levels(const std::filesystem::path& root, const Hierarchy& hierarchy,
                  HostMemory& memory) {
  const std::filesystem::path top =
      root / std::filesystem::path(hierarchy.mount->point).relative_path();
  std::string below = path_below_mount(hierarchy);
  while (true) {
    const std::filesystem::path directory =
        below.empty() ? top : top / std::filesystem::path(below).relative_path();
    const std::uint64_t bytes = bytes_free_at(directory, hierarchy.v2);
    if (bytes < memory.cgroup_bytes_free) {
      memory.cgroup_bytes_free = bytes;
      memory.cgroup = directory.string();
    }
    if (below.empty()) return;
    below.erase(below.rfind('/') == std::string::npos ? 0 : below.rfind('/'));
  }
}

}  // namespace

Result<HostMemory> read_host_memory(const std::filesystem::path& root) {
  const std::filesystem::path meminfo_path = root / "proc/meminfo";
  const auto meminfo = read_text(meminfo_path);
  const auto available =
      meminfo ? find_number(*meminfo, "MemAvailable") : std::optional<std::uint64_t>();
  if (!available || *available > kUnlimited / 1024) {
    return failure(Error{.code = ErrorCode::kIo,
                         .message = "cannot read how much memory the host has free from '" +
                                    meminfo_path.string() +
                                    "': mount /proc, or the memory ceiling cannot be kept",
                         .path = meminfo_path.string()});
  }
  HostMemory memory{
      .host_bytes_free = *available * 1024, .cgroup_bytes_free = kUnlimited, .cgroup = {}};

  const auto cgroups = read_text(root / "proc/self/cgroup");
  const auto mounts = read_text(root / "proc/self/mountinfo");
  if (!cgroups || !mounts) return memory;
  std::vector<Hierarchy> hierarchies = parse_cgroups(*cgroups);
  find_mounts(*mounts, hierarchies);
  for (const Hierarchy& hierarchy : hierarchies) {
    if (hierarchy.mount) visit_levels(root, hierarchy, memory);
  }
  // Without a limit v1 reports a number near 2^63: that is no limit.
  constexpr std::uint64_t kNoLimitV1 = 1ull << 62;
  if (memory.cgroup_bytes_free >= kNoLimitV1) {
    memory.cgroup_bytes_free = kUnlimited;
    memory.cgroup.clear();
  }
  return memory;
}

}  // namespace strandline::memory
