// Memory handed to other processes: what both see, when it is used again, and who may die.

#include "strandline/shared_memory.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/unique_fd.h"
#include "memory/exchange.h"
#include "memory/generation_table.h"
#include "memory/host_memory.h"
#include "memory/range_lock.h"
#include "memory/slab.h"
#include "testing/child_process.h"
#include "testing/temporary_directory.h"

namespace strandline::memory {
namespace {

using base::Clock;
using testing::ChildProcess;
using testing::Pipe;

constexpr std::uint64_t kMiB = 1 << 20;
constexpr Clock::Instant kDoNotWait{};  // Long ago.

Clock::Instant soon() {  // Long enough for a slow machine; tests end before it.
  return std::chrono::steady_clock::now() + std::chrono::seconds(60);
}

Slab::Options shared_options(std::uint64_t bytes_max) {
  return {.host_bytes_max = bytes_max, .shared = true};
}

Result<std::vector<Lease>> try_lease(Slab& slab, std::vector<std::uint64_t> sizes,
                                     Clock::Instant deadline = kDoNotWait) {
  base::Wait wait(deadline);
  return slab.lease(sizes, wait);
}

// A lease whose bytes are all `fill`.
Lease lease(Slab& slab, std::uint64_t bytes, int fill = 0) {
  Lease made = try_lease(slab, {bytes}).value().at(0);
  std::memset(made.data(), fill, bytes);
  return made;
}

bool all_are(const std::byte* data, std::uint64_t bytes, int fill) {
  for (std::uint64_t i = 0; i < bytes; ++i) {
    if (data[i] != static_cast<std::byte>(fill)) return false;
  }
  return true;
}

std::size_t open_descriptors() {
  const std::filesystem::directory_iterator descriptors("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(descriptors), end(descriptors)));
}

std::size_t mappings_of_shared_memory() {
  std::ifstream maps("/proc/self/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    if (line.find("memfd:strandline") != std::string::npos) ++count;
  }
  return count;
}

// Bytes that the memory file behind a descriptor of any process really takes.
std::uint64_t bytes_allocated(const SharedRange& range) {
  struct stat status {};
  const std::string path =
      "/proc/" + std::to_string(range.pid) + "/fd/" + std::to_string(range.descriptor);
  if (::stat(path.c_str(), &status) != 0) return 0;
  return static_cast<std::uint64_t>(status.st_blocks) * 512;
}

// What goes through a pipe from one process to another.
struct Message {
  std::int64_t pid = 0;
  int descriptor = -1;
  char slab[32] = {};
  std::uint64_t generation = 0;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

void send(const Pipe& pipe, const SharedRange& range) {
  Message message{.pid = range.pid,
                  .descriptor = range.descriptor,
                  .generation = range.generation,
                  .offset = range.offset,
                  .bytes = range.bytes};
  std::memcpy(message.slab, range.slab.data(), sizeof(message.slab));
  static_cast<void>(!::write(pipe.in.get(), &message, sizeof(message)));
}

SharedRange receive(const Pipe& pipe) {
  Message message;
  EXPECT_EQ(::read(pipe.out.get(), &message, sizeof(message)), ssize_t{sizeof(message)});
  return {.pid = message.pid,
          .descriptor = message.descriptor,
          .slab = std::string(message.slab, sizeof(message.slab)),
          .generation = message.generation,
          .offset = message.offset,
          .bytes = message.bytes};
}

// A child that ends as a process does, without threads.
class OtherProcess : public ChildProcess {
 public:
  explicit OtherProcess(const std::function<std::string()>& body)
      : ChildProcess([&body] {
          std::string text = body();
          exchange().sends().stop();
          return text;
        }) {}
};

// A child that stages `sizes` into a shared slab, each filled with its number from 1 on, sends the
// ranges through `ranges` and then lives, holding them, until `end` is sent to it.
std::string stage_and_hold(const std::vector<std::uint64_t>& sizes, const Pipe& ranges,
                           const Pipe& end) {
  Slab slab(shared_options(64 * kMiB));
  std::vector<Lease> leases;
  for (const std::uint64_t bytes : sizes) {
    leases.push_back(lease(slab, bytes, static_cast<int>(leases.size() + 1)));
    send(ranges, share(leases.back().data(), bytes).value());
  }
  return end.receive() ? "ended" : "left alone";
}

// Waits for what another thread or process does, without sleeping; false if it never happens.
bool happens(const std::function<bool()>& condition) {
  const auto deadline = soon();
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

// Whether the slab, of this process, still is somebody's.
bool has_owner(const SharedRange& range) {
  const std::string path = "/proc/self/fd/" + std::to_string(range.descriptor);
  const base::UniqueFd other(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  return lock_range(other.get(), RangeLock::kShared, 0, 1) == EAGAIN;
}

// Whether a thread of this process waits.
bool sleeps(pid_t thread) {
  std::ifstream file("/proc/self/task/" + std::to_string(thread) + "/stat");
  std::string text;
  std::getline(file, text);
  const std::size_t state = text.rfind(')');
  return state != std::string::npos && text.compare(state, 3, ") S") == 0;
}

class SharedMemory : public ::testing::Test {
 protected:
  // Nothing of an earlier test is kept any more, and no thread runs: some tests fork children that
  // start threads, which sanitizers follow only if there were none.
  void SetUp() override {
    exchange().sends().sweep(soon() + kClaimWait);
    exchange().sends().stop();
  }
  void TearDown() override { SetUp(); }
};

TEST_F(SharedMemory, AnotherProcessSeesTheBytesAndWritesAreSeenBothWays) {
  Slab slab(shared_options(4 * kMiB));
  const Lease held = lease(slab, kMiB + 1, 1);
  const SharedRange range = share(held.data() + 100, kMiB - 100).value();
  Pipe written;
  Pipe answered;
  OtherProcess child([&]() -> std::string {
    Result<AttachedMemory> memory = attach(range);
    if (!memory) return memory.error().text();
    if (memory->bytes != kMiB - 100) return "other bytes";
    if (memory->data == held.data() + 100) return "not mapped anew";
    if (!all_are(memory->data, memory->bytes, 1)) return "wrong at first";
    memory->data[5] = std::byte{2};
    written.send();
    if (!answered.receive()) return "no answer";
    return memory->data[6] == std::byte{3} ? "ok" : "does not see the write";
  });
  ASSERT_TRUE(written.receive());
  EXPECT_EQ(held.data()[105], std::byte{2});
  held.data()[106] = std::byte{3};
  answered.send();
  EXPECT_EQ(child.wait(), "ok");
}

TEST_F(SharedMemory, IsNotUsedAgainWhileAnotherProcessHoldsIt) {
  Slab slab(shared_options(kMiB));
  Lease held = lease(slab, kMiB, 1);
  const std::byte* const address = held.data();
  const SharedRange range = share(address, kMiB).value();
  Pipe attached;
  Pipe drop;
  Pipe dropped;
  OtherProcess child([&]() -> std::string {
    Result<AttachedMemory> memory = attach(range);
    if (!memory) return memory.error().text();
    attached.send();
    if (!drop.receive()) return "nothing was said";
    const bool same = all_are(memory->data, memory->bytes, 1);
    memory = AttachedMemory();
    dropped.send();
    return drop.receive() && same ? "ok" : "overwritten";
  });
  ASSERT_TRUE(attached.receive());
  held = {};
  EXPECT_EQ(try_lease(slab, {4096}).error().code, ErrorCode::kTimeout);
  EXPECT_EQ(slab.bytes_in_use(), kMiB);
  EXPECT_FALSE(share(address, 1)) << "nobody holds it here";
  drop.send();
  ASSERT_TRUE(dropped.receive());
  const auto again = try_lease(slab, {kMiB});
  ASSERT_TRUE(again);
  EXPECT_EQ(again->at(0).data(), address);
  drop.send();
  EXPECT_EQ(child.wait(), "ok");
}

TEST_F(SharedMemory, OfAKilledProcessIsGivenToWhoWaitsForIt) {
  Slab slab(shared_options(kMiB));
  Lease held = lease(slab, kMiB, 1);
  const SharedRange range = share(held.data(), kMiB).value();
  Pipe attached;
  Pipe never;
  OtherProcess child([&]() -> std::string {
    const Result<AttachedMemory> memory = attach(range);
    attached.send();
    return never.receive() ? "" : memory ? "held" : "not attached";
  });
  ASSERT_TRUE(attached.receive());
  held = {};
  ASSERT_FALSE(try_lease(slab, {kMiB}));
  std::atomic<pid_t> id = 0;
  std::thread waiter([&] {
    id = ::gettid();
    EXPECT_TRUE(try_lease(slab, {kMiB}, soon()));
  });
  ASSERT_TRUE(happens([&] { return id != 0 && sleeps(id); }));
  child.kill();
  waiter.join();
  EXPECT_EQ(slab.bytes_in_use(), 0u);
}

TEST_F(SharedMemory, UsedAgainCanBeSharedAgainAndTheOldRangeIsNotFound) {
  Slab slab(shared_options(kMiB));
  Pipe ranges;
  Pipe asked;
  OtherProcess child([&]() -> std::string {
    const auto old = attach(receive(ranges));
    if (old || old.error().code != ErrorCode::kNotFound) return "the old one is there";
    asked.send();
    const auto again = attach(receive(ranges));
    if (again || again.error().code != ErrorCode::kNotFound) return "it is there again";
    const auto next = attach(receive(ranges));
    if (!next) return next.error().text();
    return all_are(next->data, kMiB, 2) ? "ok" : "other bytes";
  });
  Lease held = lease(slab, kMiB, 1);
  const SharedRange old = share(held.data(), kMiB).value();
  held = {};
  exchange().sends().sweep(soon() + kClaimWait);
  send(ranges, old);
  // Only then is its place in the table another generation's.
  ASSERT_TRUE(asked.receive());
  held = lease(slab, kMiB, 2);
  send(ranges, old);
  send(ranges, share(held.data(), kMiB).value());
  EXPECT_EQ(child.wait(), "ok");
  EXPECT_TRUE(has_owner(old)) << "or others would free its pages";
}

TEST_F(SharedMemory, OfOneGenerationComesBackWhileAnotherIsHeld) {
  Slab slab(shared_options(2 * kMiB));
  std::vector<Lease> held = {lease(slab, kMiB, 1), lease(slab, kMiB, 2)};
  const SharedRange first = share(held[0].data(), kMiB).value();
  const SharedRange second = share(held[1].data(), kMiB).value();
  Pipe dropped;
  Pipe end;
  OtherProcess child([&]() -> std::string {
    Result<AttachedMemory> dropped_memory = attach(first);
    const Result<AttachedMemory> kept_memory = attach(second);
    if (!dropped_memory || !kept_memory) return "not attached";
    dropped_memory = AttachedMemory();
    dropped.send();
    return end.receive() && all_are(kept_memory->data, kMiB, 2) ? "ok" : "overwritten";
  });
  ASSERT_TRUE(dropped.receive());
  held.clear();
  const auto again = try_lease(slab, {kMiB});
  ASSERT_TRUE(again);
  EXPECT_FALSE(try_lease(slab, {4096}));
  std::memset(again->at(0).data(), 3, kMiB);
  end.send();
  EXPECT_EQ(child.wait(), "ok");
}

TEST_F(SharedMemory, AttachedIsNotLetGoOfByAForkedChildThatDropsIt) {
  Pipe ranges;
  Pipe end;
  OtherProcess owner([&]() -> std::string {
    Slab slab(shared_options(kMiB));
    Lease held = lease(slab, kMiB, 1);
    send(ranges, share(held.data(), kMiB).value());
    if (!end.receive()) return "nothing was said";
    held = {};
    return try_lease(slab, {4096}) ? "was used again" : "ok";
  });
  Result<AttachedMemory> memory = attach(receive(ranges));
  ASSERT_TRUE(memory);
  OtherProcess forked([&]() -> std::string {
    memory = AttachedMemory();
    return "ok";
  });
  ASSERT_EQ(forked.wait(), "ok");
  end.send();
  EXPECT_EQ(owner.wait(), "ok");
}

TEST_F(SharedMemory, OutlivesItsKilledOwnerAndCanBePassedOn) {
  Pipe ranges;
  Pipe never;
  std::optional<OtherProcess> owner(std::in_place, [&] {
    return stage_and_hold({2 * kMiB, kMiB}, ranges, never);
  });
  const SharedRange first = receive(ranges);
  const SharedRange second = receive(ranges);
  const Result<AttachedMemory> memory = attach(first);
  ASSERT_TRUE(memory) << memory.error().text();
  owner->kill();
  EXPECT_EQ(owner->wait(), "killed by signal 9");
  EXPECT_TRUE(all_are(memory->data, 2 * kMiB, 1));
  memory->data[7] = std::byte{9};
  const Result<AttachedMemory> known = attach(second);
  EXPECT_TRUE(known) << "its file is open here already";

  const SharedRange passed_on = share(memory->data, 4096).value();
  EXPECT_EQ(passed_on.pid, ::getpid());
  OtherProcess third([&]() -> std::string {
    const Result<AttachedMemory> again = attach(passed_on);
    if (!again) return again.error().text();
    return again->data[7] == std::byte{9} ? "ok" : "other bytes";
  });
  EXPECT_EQ(third.wait(), "ok");
}

TEST_F(SharedMemory, WhoseOwnerEndedBeforeItWasAttachedIsNotFound) {
  Pipe ranges;
  Pipe end;
  OtherProcess owner([&] { return stage_and_hold({kMiB}, ranges, end); });
  const SharedRange range = receive(ranges);
  end.send();
  ASSERT_EQ(owner.wait(), "ended");
  const Result<AttachedMemory> memory = attach(range);
  ASSERT_FALSE(memory);
  EXPECT_EQ(memory.error().code, ErrorCode::kNotFound) << memory.error().text();
}

TEST_F(SharedMemory, OfOneSlabTakesOneDescriptorInAnyProcess) {
  const std::size_t before = open_descriptors();
  Slab slab(shared_options(64 * kMiB));
  const Lease first = lease(slab, 640'000);
  std::vector<Lease> generations;
  generations.reserve(100);
  for (int i = 0; i < 100; ++i) generations.push_back(lease(slab, 4096, i));
  std::vector<SharedRange> ranges;
  for (std::uint64_t i = 0; i < 10'000; ++i) {
    ranges.push_back(share(first.data() + 64 * i, 64).value());
  }
  for (const Lease& generation : generations) {
    ranges.push_back(share(generation.data(), 4096).value());
  }
  EXPECT_EQ(open_descriptors(), before + 1);
  OtherProcess child([&]() -> std::string {
    const std::size_t descriptors = open_descriptors();
    const std::size_t mappings = mappings_of_shared_memory();
    std::vector<AttachedMemory> attached;
    for (const SharedRange& range : ranges) {
      Result<AttachedMemory> memory = attach(range);
      if (!memory) return memory.error().text();
      attached.push_back(*std::move(memory));
    }
    for (std::size_t i = 1; i < 10'000; ++i) {
      if (attached[i].data - attached[0].data != static_cast<std::ptrdiff_t>(64 * i)) {
        return "not one mapping";
      }
    }
    if (open_descriptors() != descriptors + 1) return "several descriptors";
    attached.clear();
    if (open_descriptors() != descriptors) return "descriptors stay";
    return mappings_of_shared_memory() == mappings ? "ok" : "mappings stay";
  });
  EXPECT_EQ(child.wait(), "ok");
}

TEST_F(SharedMemory, LeavesNoDescriptorOrMappingBehind) {
  const std::size_t descriptors = open_descriptors();
  const std::size_t mappings = mappings_of_shared_memory();
  for (int round = 0; round < 20; ++round) {
    Slab slab(shared_options(8 * kMiB));
    std::vector<Lease> leases = {lease(slab, 4096), lease(slab, kMiB)};
    const auto memory = attach(share(leases[1].data(), kMiB).value());
    ASSERT_TRUE(memory);
    leases.clear();
  }
  EXPECT_TRUE(happens([] { return exchange().sends().size() == 0; }));
  EXPECT_TRUE(happens([&] { return open_descriptors() == descriptors; }));
  EXPECT_TRUE(happens([&] { return mappings_of_shared_memory() == mappings; }));
}

TEST_F(SharedMemory, AttachedWhereItWasStagedIsTheSameMemory) {
  Slab slab(shared_options(kMiB));
  Lease held = lease(slab, kMiB, 1);
  const std::byte* const address = held.data();
  const SharedRange range = share(address + 4096, 10).value();
  Result<AttachedMemory> memory = attach(range);
  ASSERT_TRUE(memory);
  EXPECT_EQ(memory->data, address + 4096);
  held = {};
  EXPECT_FALSE(try_lease(slab, {4096})) << "it is still held through attach()";
  memory = AttachedMemory();
  EXPECT_TRUE(try_lease(slab, {kMiB}));
}

TEST_F(SharedMemory, SentBackByWhoAloneStillHoldsItIsTheSameMemoryAgain) {
  Slab slab(shared_options(kMiB));
  Lease held = lease(slab, kMiB, 1);
  const std::byte* const address = held.data();
  Pipe there;
  Pipe back;
  Pipe end;
  OtherProcess child([&]() -> std::string {
    const Result<AttachedMemory> memory = attach(receive(there));
    if (!memory) return memory.error().text();
    memory->data[0] = std::byte{5};
    send(back, share(memory->data, kMiB).value());
    return end.receive() ? "ok" : "nothing was said";
  });
  send(there, share(address, kMiB).value());
  const SharedRange returned = receive(back);
  EXPECT_NE(returned.pid, ::getpid());
  held = {};
  EXPECT_FALSE(try_lease(slab, {4096}));
  Result<AttachedMemory> memory = attach(returned);
  ASSERT_TRUE(memory);
  EXPECT_EQ(memory->data, address);
  EXPECT_EQ(memory->data[0], std::byte{5});
  end.send();
  EXPECT_EQ(child.wait(), "ok");
  EXPECT_FALSE(try_lease(slab, {4096}));
  memory = AttachedMemory();
  EXPECT_TRUE(try_lease(slab, {kMiB}));
}

TEST_F(SharedMemory, SentAndNeverReceivedIsKeptForAMinute) {
  Slab slab(shared_options(kMiB));
  Lease held = lease(slab, kMiB, 1);
  ASSERT_TRUE(share(held.data(), 1));
  const auto sent = std::chrono::steady_clock::now();
  held = {};
  EXPECT_FALSE(try_lease(slab, {4096}));
  exchange().sends().sweep(sent + kClaimWait - std::chrono::seconds(1));
  EXPECT_FALSE(try_lease(slab, {4096}));
  exchange().sends().sweep(sent + kClaimWait + std::chrono::seconds(1));
  EXPECT_TRUE(try_lease(slab, {4096}));
}

TEST_F(SharedMemory, SentTwiceIsKeptUntilBothHaveReceivedIt) {
  Slab slab(shared_options(kMiB));
  Lease held = lease(slab, kMiB, 1);
  const SharedRange first = share(held.data(), 10).value();
  const SharedRange second = share(held.data() + 10, 10).value();
  held = {};
  ASSERT_TRUE(attach(first));
  exchange().sends().sweep();
  EXPECT_FALSE(try_lease(slab, {4096}));
  ASSERT_TRUE(attach(second));
  EXPECT_TRUE(try_lease(slab, {4096}));
  EXPECT_EQ(attach(first).error().code, ErrorCode::kNotFound);
}

TEST_F(SharedMemory, SentByASlabThatIsGoneIsLetGoOfOnceItIsReceived) {
  const std::size_t descriptors = open_descriptors();
  std::optional<Slab> slab(shared_options(kMiB));
  Lease held = lease(*slab, kMiB, 1);
  const SharedRange range = share(held.data(), kMiB).value();
  held = {};
  slab.reset();
  Pipe go;
  Pipe end;
  {
    OtherProcess child([&]() -> std::string {
      if (!go.receive()) return "nothing was said";
      const Result<AttachedMemory> memory = attach(range);
      if (!memory) return memory.error().text();
      return end.receive() && all_are(memory->data, kMiB, 1) ? "ok" : "other bytes";
    });
    EXPECT_EQ(open_descriptors(), descriptors + 1 + 5) << "the file, and five ends of pipes";
    go.send();
    // Without any further call here.
    EXPECT_TRUE(happens([&] { return open_descriptors() == descriptors + 5; }));
    end.send();
    EXPECT_EQ(child.wait(), "ok");
  }
}

TEST_F(SharedMemory, DoesNotLieWhereTheSizeOfDevShmLimitsIt) {
  Slab slab(shared_options(kMiB));
  const Lease held = lease(slab, 4096);
  const SharedRange range = share(held.data(), 1).value();
  struct stat file {};
  struct stat dev_shm {};
  ASSERT_EQ(::fstat(range.descriptor, &file), 0);
  if (::stat("/dev/shm", &dev_shm) != 0) GTEST_SKIP() << "no /dev/shm here";
  EXPECT_NE(file.st_dev, dev_shm.st_dev);
}

TEST_F(SharedMemory, ThatIsUnmappedIsReallyFree) {
  Slab slab(shared_options(8 * kMiB));
  const Lease kept = lease(slab, 4096, 1);
  const SharedRange range = share(kept.data(), 1).value();
  std::vector<Lease> leases;
  leases.reserve(7);
  for (int i = 0; i < 7; ++i) leases.push_back(lease(slab, kMiB, i));
  EXPECT_EQ(bytes_allocated(range), 7 * kMiB + 4096 + kTableBytes);
  // Every second one is given back; what fits in none of them takes the place of all.
  for (int i = 0; i < 7; i += 2) leases[static_cast<std::size_t>(i)] = {};
  const Lease whole = lease(slab, 4 * kMiB, 9);
  EXPECT_EQ(slab.bytes_mapped(), 8 * kMiB);
  EXPECT_LE(bytes_allocated(range), 8 * kMiB + kTableBytes);
  EXPECT_TRUE(all_are(leases[1].data(), kMiB, 1));
  EXPECT_TRUE(all_are(kept.data(), 4096, 1));
}

TEST_F(SharedMemory, OfASlabThatIsGoneIsOnlyWhatIsStillHeld) {
  Pipe ranges;
  Pipe end;
  OtherProcess owner([&]() -> std::string {
    std::optional<Slab> slab(shared_options(64 * kMiB));
    std::vector<Lease> leases;
    leases.reserve(3);
    for (int i = 0; i < 3; ++i) leases.push_back(lease(*slab, 4 * kMiB, i));
    send(ranges, share(leases[0].data(), 1).value());
    send(ranges, share(leases[2].data(), 1).value());
    if (!end.receive()) return "nothing was said";
    leases.clear();
    exchange().sends().sweep();
    slab.reset();
    ranges.send();
    return end.receive() ? "ok" : "nothing was said";
  });
  Result<AttachedMemory> first = attach(receive(ranges));
  Result<AttachedMemory> third = attach(receive(ranges));
  ASSERT_TRUE(first);
  ASSERT_TRUE(third);
  const SharedRange here = share(third->data, 1).value();
  ASSERT_TRUE(attach(here));
  EXPECT_EQ(bytes_allocated(here), 12 * kMiB + kTableBytes);
  end.send();
  ASSERT_TRUE(ranges.receive());
  EXPECT_EQ(bytes_allocated(here), 8 * kMiB + kTableBytes);
  first = AttachedMemory();
  EXPECT_EQ(bytes_allocated(here), 4 * kMiB + kTableBytes) << "its owner is gone";
  EXPECT_TRUE(all_are(third->data, 1, 2));
  end.send();
  EXPECT_EQ(owner.wait(), "ok");
}

TEST_F(SharedMemory, InAForkedChildCanBeReadAndIsTheParents) {
  auto slab = std::make_unique<Slab>(shared_options(kMiB));
  Lease held = lease(*slab, 4096, 4);
  Pipe there;
  OtherProcess child([&]() -> std::string {
    if (!all_are(held.data(), 4096, 4)) return "cannot be read";
    const auto shared = share(held.data(), 4096);
    if (shared || shared.error().code != ErrorCode::kInvalidArgument) return "was shared";
    if (!attach(receive(there))) return "cannot be attached";
    held = {};
    slab.reset();
    Slab own(shared_options(kMiB));
    const Lease mine = lease(own, 4096, 5);
    return share(mine.data(), 4096) ? "ok" : "cannot share its own";
  });
  send(there, share(held.data(), 4096).value());
  EXPECT_EQ(child.wait(), "ok");
  EXPECT_TRUE(all_are(held.data(), 4096, 4));
  const SharedRange range = share(held.data(), 4096).value();
  EXPECT_TRUE(has_owner(range));
}

TEST_F(SharedMemory, OtherMemoryCannotBeShared) {
  Slab private_slab({.host_bytes_max = kMiB});
  Slab slab(shared_options(kMiB));
  const Lease unshared = lease(private_slab, 4096);
  Lease held = lease(slab, 5000);
  const std::byte* const data = held.data();
  const auto refused = [](const std::byte* at, std::uint64_t bytes) {
    const auto result = share(at, bytes);
    return !result && result.error().code == ErrorCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused(nullptr, 0));
  EXPECT_TRUE(refused(nullptr, 1));
  EXPECT_TRUE(refused(unshared.data(), 1));
  EXPECT_TRUE(refused(data, 0));
  EXPECT_TRUE(refused(data, 8193)) << "beyond its last page";
  EXPECT_TRUE(refused(data + 1, 8192));
  EXPECT_TRUE(refused(data + 1, ~0ull));
  EXPECT_TRUE(refused(data + 8192, 1));
  EXPECT_TRUE(refused(data - 1, 1)) << "the table";
  EXPECT_TRUE(share(data, 5000));
  held = {};
  exchange().sends().sweep(soon());
  EXPECT_TRUE(refused(data, 1)) << "nobody holds it";
}

TEST_F(SharedMemory, OnlyAThousandStagingsFitIntoTheTableAndThenItIsFull) {
  constexpr std::size_t kMost = GenerationTable::kPlaces - 1;
  Slab slab(shared_options(16 * kMiB));
  std::vector<Lease> held = try_lease(slab, std::vector<std::uint64_t>(kMost, 4096)).value();
  const auto refused = try_lease(slab, {4096});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kTimeout);
  EXPECT_NE(refused.error().message.find("hold all 1023"), std::string::npos);
  EXPECT_EQ(try_lease(slab, std::vector<std::uint64_t>(kMost + 1, 4096), soon()).error().code,
            ErrorCode::kMemoryLimit);
  EXPECT_TRUE(try_lease(slab, {0})) << "nothing needs no place";
  held.pop_back();
  EXPECT_TRUE(try_lease(slab, {4096}));
}

TEST_F(SharedMemory, ThreadsMayShareAttachAndDropTheSameMemory) {
  Pipe ranges;
  Pipe end;
  OtherProcess owner([&] { return stage_and_hold({kMiB, kMiB}, ranges, end); });
  const std::vector<SharedRange> staged = {receive(ranges), receive(ranges)};
  const std::size_t descriptors = open_descriptors();
  std::vector<std::thread> threads;
  for (std::size_t id = 0; id < 4; ++id) {
    threads.emplace_back([&, id] {
      for (std::size_t round = 0; round < 200; ++round) {
        const std::size_t which = (id + round) % 2;
        const auto memory = attach(staged[which]);
        ASSERT_TRUE(memory) << memory.error().text();
        EXPECT_EQ(memory->data[4095], static_cast<std::byte>(which + 1));
        const auto passed_on = share(memory->data, 1);
        ASSERT_TRUE(passed_on);
        EXPECT_EQ(attach(*passed_on).value().data, memory->data);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(happens([&] { return open_descriptors() == descriptors; }));
  end.send();
  EXPECT_EQ(owner.wait(), "ended");
}

TEST_F(SharedMemory, SignalsDoNotKeepMemoryFromBeingAllocated) {
  struct sigaction action {};
  struct sigaction previous {};
  action.sa_handler = [](int) {};
  ASSERT_EQ(::sigaction(SIGALRM, &action, &previous), 0);
  const itimerval often{.it_interval = {.tv_sec = 0, .tv_usec = 500},
                        .it_value = {.tv_sec = 0, .tv_usec = 500}};
  ASSERT_EQ(::setitimer(ITIMER_REAL, &often, nullptr), 0);
  {
    Slab slab(shared_options(64 * kMiB));
    const Lease held = lease(slab, 32 * kMiB, 1);
    EXPECT_TRUE(all_are(held.data(), 32 * kMiB, 1));
  }
  const itimerval never{};
  ASSERT_EQ(::setitimer(ITIMER_REAL, &never, nullptr), 0);
  ASSERT_EQ(::sigaction(SIGALRM, &previous, nullptr), 0);
}

// The limits of a process are errors there, never signals.
TEST_F(SharedMemory, LimitsOfFilesAreErrors) {
  const auto with_limit = [](int resource, rlim_t most) {
    return OtherProcess([=]() -> std::string {
             const struct rlimit limit { .rlim_cur = most, .rlim_max = most };
             if (::setrlimit(static_cast<__rlimit_resource_t>(resource), &limit) != 0) return "?";
             Slab::Options options = shared_options(4 * kMiB);
             options.host_memory = [] { return HostMemory{4 * kMiB, 4 * kMiB, {}}; };
             Slab slab(std::move(options));
             const auto made = try_lease(slab, {2 * kMiB});
             if (!made) return std::string(error_code_name(made.error().code));
             std::memset(made->at(0).data(), 1, 2 * kMiB);
             return "ok";
           })
        .wait();
  };
  EXPECT_EQ(with_limit(RLIMIT_FSIZE, kMiB), error_code_name(ErrorCode::kMemoryLimit));
  EXPECT_EQ(with_limit(RLIMIT_FSIZE, 16 * kMiB), "ok");
#if !defined(__SANITIZE_ADDRESS__)  // Its companion for undefined behaviour looks through a pipe.
  EXPECT_EQ(with_limit(RLIMIT_NOFILE, 0), error_code_name(ErrorCode::kMemoryLimit));
#endif
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // They need the addresses.
TEST_F(SharedMemory, MakesDoWithTheAddressesThatAProcessIsAllowed) {
  OtherProcess child([]() -> std::string {
    const struct rlimit limit { .rlim_cur = 3ull << 30, .rlim_max = 3ull << 30 };
    if (::setrlimit(RLIMIT_AS, &limit) != 0) return "?";
    Slab slab(shared_options(256 * kMiB));
    const auto made = try_lease(slab, {64 * kMiB});
    if (!made) return made.error().text();
    const auto refused = try_lease(slab, {8192 * kMiB});
    return refused ? "more than there can be" : "ok";
  });
  EXPECT_EQ(child.wait(), "ok");
}
#endif

TEST_F(SharedMemory, IsNotFilledByAProcessThatLocksItsMemory) {
  OtherProcess child([]() -> std::string {
    if (::mlockall(MCL_FUTURE) != 0) return "not allowed here";
    Slab slab(shared_options(kMiB));
    const auto made = try_lease(slab, {kMiB / 2});
    if (!made) return made.error().text();
    const SharedRange range = share(made->at(0).data(), 1).value();
    return bytes_allocated(range) == kMiB / 2 + kTableBytes ? "ok" : "was filled";
  });
  EXPECT_THAT(child.wait(), ::testing::AnyOf("ok", "not allowed here"));
}

}  // namespace
}  // namespace strandline::memory
