// What arrives from another process is not trusted: ranges that make no sense, descriptors of other
// files, tables that lie. None of it may block, change a file, or lead out of bounds.

#include "memory/attached_slab.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/unique_fd.h"
#include "memory/generation_table.h"
#include "memory/pages.h"
#include "memory/range_lock.h"
#include "memory/slab.h"
#include "strandline/shared_memory.h"
#include "testing/child_process.h"
#include "testing/temporary_directory.h"

namespace strandline::memory {
namespace {

using testing::ChildProcess;
using testing::Pipe;
using testing::TemporaryDirectory;

constexpr std::uint64_t kMiB = 1 << 20;
constexpr std::uint64_t kNumber = GenerationTable::kPlaces + 3;
const std::string kSlab = "0123456789abcdef0123456789abcdef";

std::string code_of(const Result<AttachedMemory>& result) {
  return result ? "attached" : std::string(error_code_name(result.error().code));
}
std::string name_of(ErrorCode code) { return std::string(error_code_name(code)); }

// A range that names a descriptor of this process, of no slab that this process knows.
SharedRange range_at(int descriptor) {
  return {.pid = ::getpid(),
          .descriptor = descriptor,
          .slab = kSlab,
          .generation = kNumber,
          .offset = kTableBytes,
          .bytes = kPageBytes};
}

base::UniqueFd memory_file(std::uint64_t bytes, int seals) {
  base::UniqueFd file(::memfd_create("forged", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_EQ(::ftruncate(file.get(), static_cast<off_t>(bytes)), 0);
  if (seals != 0) {
    EXPECT_EQ(::fcntl(file.get(), F_ADD_SEALS, seals), 0);
  }
  return file;
}

// A slab whose table is written by the test.
class ForgedSlab {
 public:
  explicit ForgedSlab(std::uint64_t bytes = kTableBytes + kMiB)
      : file_(memory_file(bytes, F_SEAL_SHRINK | F_SEAL_GROW)),
        memory_(static_cast<std::byte*>(
            ::mmap(nullptr, kTableBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file_.get(), 0))) {
    table().create(kSlab);
  }
  ~ForgedSlab() { ::munmap(memory_, kTableBytes); }
  ForgedSlab(const ForgedSlab&) = delete;
  ForgedSlab& operator=(const ForgedSlab&) = delete;

  [[nodiscard]] GenerationTable table() const { return GenerationTable(memory_); }
  [[nodiscard]] std::byte* memory() const { return memory_; }
  [[nodiscard]] int descriptor() const { return file_.get(); }
  [[nodiscard]] SharedRange range() const { return range_at(file_.get()); }

 private:
  const base::UniqueFd file_;
  std::byte* const memory_;
};

TEST(AttachedSlab, AForgedSlabThatIsRightCanBeAttached) {
  const ForgedSlab slab;
  slab.table().write({.number = kNumber, .offset = kTableBytes, .bytes = kMiB});
  const auto memory = attach(slab.range());
  ASSERT_TRUE(memory) << memory.error().text();
  memory->data[kPageBytes - 1] = std::byte{1};
  std::byte seen{};
  ASSERT_EQ(::pread(slab.descriptor(), &seen, 1, kTableBytes + kPageBytes - 1), 1);
  EXPECT_EQ(seen, std::byte{1});
}

TEST(AttachedSlab, RangesThatMakeNoSenseAreRefused) {
  const ForgedSlab slab;
  slab.table().write({.number = kNumber, .offset = kTableBytes, .bytes = kMiB});
  const std::string invalid = name_of(ErrorCode::kInvalidArgument);
  const auto changed = [&](const std::function<void(SharedRange&)>& change) {
    SharedRange range = slab.range();
    change(range);
    return code_of(attach(range));
  };
  constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();
  for (const std::int64_t pid : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{1} << 32,
                                 std::numeric_limits<std::int64_t>::min()}) {
    EXPECT_EQ(changed([&](SharedRange& range) { range.pid = pid; }), invalid) << pid;
  }
  EXPECT_EQ(changed([](SharedRange& range) { range.descriptor = -1; }), invalid);
  for (const char* id : {"", "0123", "../../../../../../../etc/passwd0",
                         "0123456789ABCDEF0123456789ABCDEF", "0123456789abcdef0123456789abcdef0"}) {
    EXPECT_EQ(changed([&](SharedRange& range) { range.slab = id; }), invalid) << id;
  }
  for (const std::uint64_t offset :
       {std::uint64_t{0}, kTableBytes - 1, kTableBytes + kMiB, kTableBytes + kMiB - 1, kMost,
        kMost - kPageBytes + 1, std::uint64_t{1} << 63}) {
    EXPECT_EQ(changed([&](SharedRange& range) { range.offset = offset; }), invalid) << offset;
  }
  for (const std::uint64_t bytes : {std::uint64_t{0}, kMiB + 1, kMost, kMost - kTableBytes + 1}) {
    EXPECT_EQ(changed([&](SharedRange& range) { range.bytes = bytes; }), invalid) << bytes;
  }
  // The same ranges while the generation is mapped.
  const auto held = attach(slab.range());
  ASSERT_TRUE(held);
  EXPECT_EQ(changed([](SharedRange& range) { range.offset = kMost; }), invalid);
  EXPECT_EQ(changed([](SharedRange& range) { range.bytes = kMiB + 1; }), invalid);
  EXPECT_EQ(changed([](SharedRange& range) { range.bytes = 0; }), invalid);
}

TEST(AttachedSlab, InTheProcessThatStagedItTheSameRangesAreRefused) {
  Slab slab({.host_bytes_max = kMiB, .shared = true});
  base::Wait wait(base::Clock::Instant{});
  const auto held = slab.lease(std::vector<std::uint64_t>{kPageBytes, kPageBytes}, wait).value();
  const SharedRange right = share(held[0].data(), kPageBytes).value();
  const std::string invalid = name_of(ErrorCode::kInvalidArgument);
  for (const std::uint64_t offset :
       {std::uint64_t{0}, right.offset - 1, right.offset + 1, right.offset + kPageBytes,
        std::numeric_limits<std::uint64_t>::max()}) {
    SharedRange range = right;
    range.offset = offset;
    EXPECT_EQ(code_of(attach(range)), invalid) << offset;
  }
  for (const std::uint64_t bytes :
       {std::uint64_t{0}, kPageBytes + 1, std::numeric_limits<std::uint64_t>::max()}) {
    SharedRange range = right;
    range.bytes = bytes;
    EXPECT_EQ(code_of(attach(range)), invalid) << bytes;
  }
  SharedRange range = right;
  range.generation += GenerationTable::kPlaces;
  EXPECT_EQ(code_of(attach(range)), name_of(ErrorCode::kNotFound));
  EXPECT_EQ(code_of(attach(right)), "attached");
}

TEST(AttachedSlab, WhatIsNotThereAnyMoreIsNotFound) {
  const ForgedSlab slab;
  slab.table().write({.number = kNumber, .offset = kTableBytes, .bytes = kMiB});
  const std::string gone = name_of(ErrorCode::kNotFound);
  const auto changed = [&](const std::function<void(SharedRange&)>& change) {
    SharedRange range = slab.range();
    change(range);
    return code_of(attach(range));
  };
  EXPECT_EQ(changed([](SharedRange& range) { range.pid = std::numeric_limits<pid_t>::max(); }),
            gone);
  EXPECT_EQ(changed([](SharedRange& range) { range.descriptor = 1 << 20; }), gone);
  EXPECT_EQ(changed([](SharedRange& range) { range.slab[0] = 'f'; }), gone);
  for (const std::uint64_t other : {kNumber + GenerationTable::kPlaces, kNumber + 1,
                                    std::uint64_t{0}, 5 * GenerationTable::kPlaces}) {
    EXPECT_EQ(changed([&](SharedRange& range) { range.generation = other; }), gone) << other;
  }
  slab.table().mark_dead(kNumber);
  EXPECT_EQ(code_of(attach(slab.range())), gone);
  // Its own process takes it back at this moment.
  slab.table().write({.number = kNumber, .offset = kTableBytes, .bytes = kMiB});
  ASSERT_EQ(lock_range(slab.descriptor(), RangeLock::kExclusive, kTableBytes, kMiB), 0);
  EXPECT_EQ(code_of(attach(slab.range())), gone);
  unlock_range(slab.descriptor(), kTableBytes, kMiB);
  EXPECT_EQ(code_of(attach(slab.range())), "attached");
}

TEST(AttachedSlab, OtherFilesAreNeitherOpenedNorChanged) {
  const TemporaryDirectory directory;
  const std::string gone = name_of(ErrorCode::kNotFound);

  const std::string plain = directory / "plain";
  std::ofstream(plain) << std::string(2 * kTableBytes, 'x');
  const base::UniqueFd file(::open(plain.c_str(), O_RDWR | O_CLOEXEC));
  struct stat before {};
  struct stat after {};
  ASSERT_EQ(::fstat(file.get(), &before), 0);
  EXPECT_EQ(code_of(attach(range_at(file.get()))), gone);
  std::filesystem::remove(plain);
  EXPECT_EQ(code_of(attach(range_at(file.get()))), gone) << "without a name";
  ASSERT_EQ(::fstat(file.get(), &after), 0);
  EXPECT_EQ(before.st_size, after.st_size);
  EXPECT_EQ(before.st_mtim.tv_nsec, after.st_mtim.tv_nsec);

  // Opening the other end of this would end the wait of whoever waits for it.
  const std::string fifo = directory / "fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  const base::UniqueFd reader(::open(fifo.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  EXPECT_EQ(code_of(attach(range_at(reader.get()))), gone);
  EXPECT_EQ(::open(fifo.c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC) >= 0, true);

  const base::UniqueFd device(::open("/dev/zero", O_RDWR | O_CLOEXEC));
  EXPECT_EQ(code_of(attach(range_at(device.get()))), gone);
  const base::UniqueFd folder(::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  EXPECT_EQ(code_of(attach(range_at(folder.get()))), gone);
  const Pipe pipe;
  EXPECT_EQ(code_of(attach(range_at(pipe.out.get()))), gone);
  EXPECT_EQ(code_of(attach(range_at(pipe.in.get()))), gone);
  const base::UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(code_of(attach(range_at(socket.get()))), gone);
  const base::UniqueFd looked_at(::open("/proc/self/status", O_RDONLY | O_CLOEXEC));
  EXPECT_EQ(code_of(attach(range_at(looked_at.get()))), gone);
}

TEST(AttachedSlab, OtherMemoryFilesAreRefused) {
  const std::string gone = name_of(ErrorCode::kNotFound);
  constexpr int kSealed = F_SEAL_SHRINK | F_SEAL_GROW;
  const base::UniqueFd unsealed = memory_file(kTableBytes + kMiB, 0);
  void* const memory =
      ::mmap(nullptr, kTableBytes, PROT_READ | PROT_WRITE, MAP_SHARED, unsealed.get(), 0);
  GenerationTable table(static_cast<std::byte*>(memory));
  table.create(kSlab);
  table.write({.number = kNumber, .offset = kTableBytes, .bytes = kMiB});
  EXPECT_EQ(code_of(attach(range_at(unsealed.get()))), gone) << "could be cut off under our feet";
  EXPECT_EQ(code_of(attach(range_at(memory_file(kTableBytes + kMiB, kSealed).get()))), gone);
  EXPECT_EQ(code_of(attach(range_at(memory_file(kTableBytes - 1, kSealed).get()))), gone);
  EXPECT_EQ(code_of(attach(range_at(memory_file(0, kSealed).get()))), gone);
  const base::UniqueFd read_only = memory_file(kTableBytes + kMiB, kSealed | F_SEAL_WRITE);
  EXPECT_FALSE(attach(range_at(read_only.get())));

  const ForgedSlab slab;
  slab.table().write({.number = kNumber, .offset = kTableBytes, .bytes = kMiB});
  const std::uint32_t version = kTableVersion + 1;
  std::memcpy(slab.memory() + 8, &version, sizeof(version));
  EXPECT_EQ(code_of(attach(slab.range())), name_of(ErrorCode::kUnsupported));
}

TEST(AttachedSlab, ATableThatLiesIsCorrupt) {
  const ForgedSlab slab;
  constexpr std::uint64_t kFile = kTableBytes + kMiB;
  constexpr std::uint64_t kMost =
      std::numeric_limits<std::uint64_t>::max() / kPageBytes * kPageBytes;
  const std::vector<std::pair<std::uint64_t, std::uint64_t>> lies = {
      {0, kFile},
      {kTableBytes - kPageBytes, kMiB},
      {kTableBytes + 1, kPageBytes},
      {kTableBytes, kMiB + kPageBytes},
      {kTableBytes, kMiB - 1},
      {kTableBytes, 0},
      {kTableBytes, kMost},
      {kFile, kPageBytes},
      {kMost, kPageBytes},
      {kMost, kMost},
      {std::uint64_t{1} << 63, std::uint64_t{1} << 63},
  };
  for (const auto& [offset, bytes] : lies) {
    slab.table().write({.number = kNumber, .offset = offset, .bytes = bytes});
    SharedRange range = slab.range();
    range.offset = offset;
    EXPECT_EQ(code_of(attach(range)), name_of(ErrorCode::kCorrupt)) << offset << " " << bytes;
  }
}

TEST(AttachedSlab, ATableThatChangesAllTheTimeLeadsNowhereElse) {
  ForgedSlab slab;
  std::jthread liar([&](const std::stop_token& stop) {
    std::mt19937_64 random(1);
    while (!stop.stop_requested()) {
      const std::uint64_t offset = random() % 3 == 0 ? random() : random() % 300 * kPageBytes;
      const std::uint64_t bytes = random() % 3 == 0 ? random() : random() % 300 * kPageBytes;
      slab.table().write({.number = kNumber, .offset = offset, .bytes = bytes});
      if (random() % 4 == 0) slab.table().mark_dead(kNumber);
    }
  });
  std::mt19937_64 random(2);
  std::size_t attached = 0;
  for (int round = 0; round < 20'000; ++round) {
    SharedRange range = slab.range();
    range.offset = random() % 300 * kPageBytes;
    range.bytes = 1 + random() % (2 * kPageBytes);
    const auto memory = attach(range);
    if (!memory) continue;
    ++attached;
    ASSERT_GE(range.offset, kTableBytes);
    ASSERT_LE(range.offset + range.bytes, kTableBytes + kMiB);
    memory->data[0] = std::byte{1};
    memory->data[range.bytes - 1] = std::byte{1};
  }
  EXPECT_GT(attached, 0u);
}

// The slab's own process takes the generation back whenever nobody holds it.
TEST(AttachedSlab, WhatWasAttachedIsNeverTakenBackMeanwhile) {
  const ForgedSlab slab;
  std::jthread own([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      slab.table().write({.number = kNumber, .offset = kTableBytes, .bytes = kMiB});
      for (int i = 0; i < 5; ++i) std::this_thread::yield();
      while (lock_range(slab.descriptor(), RangeLock::kExclusive, kTableBytes, kMiB) != 0) {
        if (stop.stop_requested()) return;
      }
      slab.table().mark_dead(kNumber);
      unlock_range(slab.descriptor(), kTableBytes, kMiB);
      for (int i = 0; i < 5; ++i) std::this_thread::yield();
    }
  });
  std::size_t attached = 0;
  // Until it was there often enough: that depends on how the threads take turns.
  for (int round = 0; round < 100'000 && attached < 200; ++round) {
    const auto memory = attach(slab.range());
    if (!memory) continue;
    ++attached;
    for (int i = 0; i < 3; ++i) {
      ASSERT_TRUE(slab.table().find(kNumber)) << "round " << round;
      std::this_thread::yield();
    }
  }
  EXPECT_GT(attached, 0u);
}

// Another process writes anything into the table: the slab's own process goes by its own records.
TEST(AttachedSlab, ADamagedTableDoesNotTouchTheSlabsOwnProcess) {
  Slab slab({.host_bytes_max = kMiB, .shared = true});
  const std::vector<std::uint64_t> sizes = {kPageBytes, kMiB / 4, kMiB / 2};
  const auto lease = [&] {
    base::Wait wait(base::Clock::Instant{});  // Does not wait.
    return slab.lease(sizes, wait);
  };
  auto held = lease().value();
  const SharedRange range = share(held[0].data(), 1).value();
  for (const unsigned seed : {0u, 255u, 1u, 2u, 3u}) {
    ChildProcess vandal([&]() -> std::string {
      const std::string path =
          "/proc/" + std::to_string(range.pid) + "/fd/" + std::to_string(range.descriptor);
      const base::UniqueFd file(::open(path.c_str(), O_RDWR | O_CLOEXEC));
      std::vector<unsigned char> garbage(kTableBytes, static_cast<unsigned char>(seed));
      if (seed != 0 && seed != 255) {
        std::mt19937 random(seed);
        for (unsigned char& each : garbage) each = static_cast<unsigned char>(random());
      }
      const ssize_t put = ::pwrite(file.get(), garbage.data(), garbage.size(), 0);
      return put == static_cast<ssize_t>(garbage.size()) ? "ok" : "cannot write";
    });
    ASSERT_EQ(vandal.wait(), "ok");
    for (const Lease& each : held) std::memset(each.data(), 7, each.bytes());
    {
      const auto again = share(held[1].data() + 5, 10);
      ASSERT_TRUE(again);
      const auto same = attach(*again);
      ASSERT_TRUE(same);
      EXPECT_EQ(same->data, held[1].data() + 5);
      held.clear();
      // The table may say anything of what was claimed, but for a minute only.
      exchange().sends().sweep(std::chrono::steady_clock::now() + 2 * kClaimWait);
      EXPECT_EQ(attach(*again).value().data, same->data) << "it is held";
    }
    held = lease().value();
    EXPECT_EQ(slab.bytes_in_use(), kPageBytes + kMiB / 4 + kMiB / 2);
  }
}

}  // namespace
}  // namespace strandline::memory
