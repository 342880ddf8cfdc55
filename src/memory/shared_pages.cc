// Memory that another process can map, without copying and with one descriptor.
//
// Problem. A staged state has thousands of tensors and is sent to another process, which may be
// killed, as may this one. One memory file a tensor, as is usual, runs out of descriptors; a named
// file in /dev/shm runs out of its size, and stays behind when everybody is killed.
//
// Approach. One anonymous memory file (memfd) a slab, as long as all the memory it could ever hold,
// almost all of it a hole. Its limit is the memory cgroup's, and it is gone with the last process
// that has it open or mapped. Address space of the same length is reserved once, so that an address
// minus the beginning is the offset in the file: neighbours in one are neighbours in the other, and
// the arena may join and cut free ranges as it likes. Only ranges in use are mapped: the rest can
// be neither touched by mistake, nor filled by mlockall(), nor written into a core file.
//
// Pages are allocated (fallocate) before anybody touches them, because a page that the kernel
// cannot allocate at the touch is a SIGBUS or the end by its out-of-memory killer, and in fallocate
// an error. Pages come back by punching holes. The file is sealed at its length, so that no process
// that has it can cut it off under another's feet.
//
// Who still uses what. Each lease is a generation: a place in the table (generation_table.h) with a
// number that is never used twice. A process that maps one holds a shared lock on the generation's
// range of the file, on its own open file description, and looks after locking whether the
// generation is still alive. To use the range again this process takes the exclusive lock, which
// fails while anybody holds a shared one, marks the generation dead, and lets go. Whoever locks
// before is seen; whoever locks later finds it dead. Locks end with the process that held them,
// however it ends. What is not trusted is the table: another process can write anything there, and
// so this one decides by its own records and by the locks alone.
//
// The lock on the first byte says that this process still cares for the slab. Where it is gone, who
// gives back a generation as the last one frees its pages (attached_slab.cc).
//
// Fork. Children inherit file and mappings, so they can read what the parent staged, for as long as
// the parent holds it.
//
// Rejected: counters of users in the table (a killed process never takes its count back), one file
// a generation (as many descriptors), POSIX locks (they end when *any* descriptor of the file is
// closed), a table in this process alone, asked for over a socket (a thread that must answer while
// the process is busy or stopped).

#include "memory/shared_pages.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <limits>
#include <utility>

#include "base/checked_math.h"
#include "base/fork.h"
#include "base/result_macros.h"
#include "memory/range_lock.h"

namespace strandline::memory {
namespace {

// Of <linux/memfd.h> since Linux 6.3; without it, newer kernels may be configured to refuse.
constexpr unsigned kNotExecutableSealed = 0x0008;

// A signal undoes what one fallocate() has done so far. A piece of this size takes a quarter of a
// millisecond, so that even under the timer of a profiler each is done at last.
constexpr std::uint64_t kPieceBytes = std::uint64_t{256} << 10;

// So that huge pages, where the kernel has them for files, are aligned in memory as in the file.
constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;

std::string random_id() {
  std::array<unsigned char, 16> bits{};
  std::size_t got = 0;
  while (got < bits.size()) {
    const ssize_t more = ::getrandom(bits.data() + got, bits.size() - got, 0);
    if (more > 0) got += static_cast<std::size_t>(more);
  }
  constexpr const char* kDigits = "0123456789abcdef";
  std::string id;
  for (const unsigned char byte : bits) {
    id += kDigits[byte >> 4];
    id += kDigits[byte & 15];
  }
  return id;
}

// `bytes` of addresses that nothing is mapped at. Null where there is no room for them.
std::byte* reserve_addresses(std::uint64_t bytes) {
  const std::uint64_t all = bytes + kHugePageBytes;
  void* mapped =
      ::mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* const begin = static_cast<std::byte*>(mapped);
  const std::uint64_t address = reinterpret_cast<std::uintptr_t>(mapped);
  const std::uint64_t skipped = base::round_up(address, kHugePageBytes) - address;
  if (skipped > 0) ::munmap(begin, skipped);
  ::munmap(begin + skipped + bytes, kHugePageBytes - skipped);
  return begin + skipped;
}

// The most that a file may be long: beyond, extending it is answered by a signal that kills.
std::uint64_t file_bytes_max() {
  struct rlimit limit {};
  if (::getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) {
    return std::numeric_limits<std::int64_t>::max();
  }
  return limit.rlim_cur;
}

Error too_long(std::uint64_t bytes) {
  Error refusal = cannot_map(bytes, EFBIG);
  refusal.message += "; raise the limit of file sizes (`ulimit -f`), which holds for memory too";
  return refusal;
}

int allocate(int fd, int mode, std::uint64_t offset, std::uint64_t bytes) {
  for (std::uint64_t done = 0; done < bytes;) {
    const std::uint64_t piece = std::min(bytes - done, kPieceBytes);
    if (::fallocate(fd, mode, static_cast<off_t>(offset + done), static_cast<off_t>(piece)) == 0) {
      done += piece;
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

}  // namespace

SharedPages::SharedPages() : id_(random_id()), fork_generation_(base::fork_generation()) {
  // From the back, so that the first places are used first and the table touches few pages.
  for (std::uint64_t place = GenerationTable::kPlaces - 1; place > 0; --place) {
    places_free_.push_back(place);
  }
}

SharedPages::~SharedPages() {
  if (base_ == nullptr) return;
  ::munmap(base_, reserved_bytes_);
  // Forked children may keep the file open for long; what they hold does not count.
  if (base::fork_generation() == fork_generation_) unlock_range(file_.get(), 0, 1);
}

// Address space and file for a slab that needs at least `bytes` at once.
Status SharedPages::reserve(std::uint64_t bytes) {
  const auto host_bytes = static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) *
                          static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t least = base::checked_add(bytes, kTableBytes).value_or(~std::uint64_t{0});
  std::uint64_t wanted = std::max(kReservedBytesMin, host_bytes * kReservedPerHostByte);
  wanted = std::min(std::max(wanted, least), file_bytes_max() / kPageBytes * kPageBytes);
  if (wanted < least) return failure(too_long(bytes));
  base_ = reserve_addresses(wanted);
  while (base_ == nullptr) {
    // Less will do where addresses are limited (ulimit -v).
    wanted = wanted / 2 / kPageBytes * kPageBytes;
    if (wanted < least) return failure(cannot_map(bytes, ENOMEM));
    base_ = reserve_addresses(wanted);
  }
  reserved_bytes_ = wanted;
  Status created = create_file(wanted);
  if (!created) {
    ::munmap(std::exchange(base_, nullptr), reserved_bytes_);
    file_.reset();
    return created;
  }
  GenerationTable(base_).create(id_);
  unused_.add(base_ + kTableBytes, reserved_bytes_ - kTableBytes);
  return {};
}

Status SharedPages::create_file(std::uint64_t bytes) {
  constexpr unsigned kFlags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  file_ = base::UniqueFd(::memfd_create("strandline", kFlags | kNotExecutableSealed));
  if (!file_ && errno == EINVAL) {
    file_ = base::UniqueFd(::memfd_create("strandline", kFlags));
  }
  const int fd = file_.get();
  const bool made = fd >= 0 && ::fchmod(fd, S_IRUSR | S_IWUSR) == 0 &&
                    ::ftruncate(fd, static_cast<off_t>(bytes)) == 0 &&
                    ::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0;
  if (!made) return failure(cannot_map(bytes, errno));
  if (const int error = lock_range(fd, RangeLock::kExclusive, 0, 1); error != 0) {
    return failure(cannot_map(bytes, error));
  }
  return back(base_, kTableBytes);
}

Result<std::byte*> SharedPages::map(std::uint64_t bytes) {
  if (base_ == nullptr) STRANDLINE_RETURN_IF_ERROR(reserve(bytes));
  std::byte* data = unused_.take(bytes);
  if (data == nullptr) return failure(cannot_map(bytes, ENOMEM));
  return data;
}

Status SharedPages::back(std::byte* data, std::uint64_t bytes) {
  const auto offset = static_cast<std::uint64_t>(data - base_);
  if (const int error = allocate(file_.get(), 0, offset, bytes); error != 0) {
    return failure(cannot_map(bytes, error));
  }
  if (::mmap(data, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file_.get(),
             static_cast<off_t>(offset)) == MAP_FAILED) {
    return failure(cannot_map(bytes, errno));
  }
  return {};
}

void SharedPages::unmap(std::byte* data, std::uint64_t bytes) {
  // Should the kernel refuse (too many mappings), the old one stays, which harms nobody.
  static_cast<void>(::mmap(data, bytes, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0));
  static_cast<void>(allocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                             static_cast<std::uint64_t>(data - base_), bytes));
  unused_.add(data, bytes);
}

void SharedPages::open(std::byte* data, std::uint64_t bytes) {
  const std::uint64_t place = places_free_.back();
  places_free_.pop_back();
  const Generation generation{.number = next_serial_++ * GenerationTable::kPlaces + place,
                              .offset = static_cast<std::uint64_t>(data - base_),
                              .bytes = bytes};
  open_.emplace(data, generation);
  table().write(generation);
}

bool SharedPages::close(std::byte* data) {
  const auto found = open_.find(data);
  const Generation generation = found->second;
  // Any error says nothing about the others: then the memory is rather kept.
  if (lock_range(file_.get(), RangeLock::kExclusive, generation.offset, generation.bytes) != 0) {
    return false;
  }
  forget(found);
  unlock_range(file_.get(), generation.offset, generation.bytes);
  return true;
}

void SharedPages::cancel(std::byte* data) { forget(open_.find(data)); }

void SharedPages::forget(Open::iterator range) {
  const std::uint64_t number = range->second.number;
  table().mark_dead(number);
  places_free_.push_back(number % GenerationTable::kPlaces);
  open_.erase(range);
}

Generation SharedPages::generation_at(std::byte* data) const { return open_.find(data)->second; }

std::byte* SharedPages::find(std::uint64_t generation) const {
  for (const auto& [data, open] : open_) {
    if (open.number == generation) return data;
  }
  return nullptr;
}

}  // namespace strandline::memory
