// The slab's promises: leases never overlap, mapped memory never exceeds the ceiling, whoever waits
// is woken, and fragmentation never makes a request fail that fits.

#include "memory/slab.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <latch>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "base/checked_math.h"
#include "base/unique_fd.h"
#include "memory/range_lock.h"
#include "strandline/shared_memory.h"

namespace strandline::memory {
namespace {

using base::Clock;

constexpr std::uint64_t kMiB = 1 << 20;
constexpr Clock::Instant kDoNotWait{};  // Long ago.

Clock::Instant soon() {  // Long enough for a slow machine; tests end before it.
  return std::chrono::steady_clock::now() + std::chrono::seconds(60);
}

Slab::Options ceiling(std::uint64_t bytes, bool shared = false) {
  Slab::Options options;
  options.host_bytes_max = bytes;
  options.shared = shared;
  return options;
}

Slab::Options with_free_memory(std::function<std::uint64_t()> host,
                               std::optional<std::uint64_t> bytes_max = std::nullopt,
                               bool shared = false) {
  Slab::Options options;
  options.host_bytes_max = bytes_max;
  options.shared = shared;
  options.host_memory = [host = std::move(host)]() -> Result<HostMemory> {
    return HostMemory{.host_bytes_free = host(), .cgroup_bytes_free = 77 * kMiB, .cgroup = "/job"};
  };
  return options;
}

Result<std::vector<Lease>> lease(Slab& slab, std::vector<std::uint64_t> sizes,
                                 Clock::Instant deadline = kDoNotWait) {
  base::Wait wait(deadline);
  return slab.lease(sizes, wait);
}

// Every word of the lease says whose it is.
void stamp(const Lease& lease, std::uint64_t mark) {
  for (std::uint64_t at = 0; at + 8 <= lease.bytes(); at += 512) {
    const std::uint64_t word = mark * 1'000'003 + at;
    std::memcpy(lease.data() + at, &word, 8);
  }
}
bool stamped(const Lease& lease, std::uint64_t mark) {
  for (std::uint64_t at = 0; at + 8 <= lease.bytes(); at += 512) {
    std::uint64_t word = 0;
    std::memcpy(&word, lease.data() + at, 8);
    if (word != mark * 1'000'003 + at) return false;
  }
  return true;
}

// Private and shared ones.
class EverySlab : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Pages, EverySlab, testing::Bool(),
                         [](const auto& shared) { return shared.param ? "Shared" : "Private"; });

TEST_P(EverySlab, LeasesArePageAlignedAndHaveTheSizesAskedFor) {
  Slab slab(ceiling(kMiB, GetParam()));
  const auto leases = lease(slab, {1, 4096, 4097, 100'000});
  ASSERT_TRUE(leases);
  ASSERT_EQ(leases->size(), 4u);
  EXPECT_EQ((*leases)[2].bytes(), 4097u);
  for (const Lease& each : *leases) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(each.data()) % kPageBytes, 0u);
  }
  EXPECT_EQ(slab.bytes_in_use(), 4096u + 4096 + 8192 + 102'400);
}

TEST_P(EverySlab, ALeaseOfNoBytesIsValidAndCostsNothing) {
  Slab slab(ceiling(0, GetParam()));
  const auto leases = lease(slab, {0, 0});
  ASSERT_TRUE(leases);
  EXPECT_TRUE((*leases)[0]);
  EXPECT_EQ((*leases)[0].bytes(), 0u);
  EXPECT_EQ(slab.bytes_mapped(), 0u);
  EXPECT_FALSE(Lease());
}

TEST_P(EverySlab, LeasesNeverOverlapWhateverTheOrderOfReturns) {
  constexpr std::uint64_t kCeiling = 8 * kMiB;
  Slab slab(ceiling(kCeiling, GetParam()));
  std::mt19937_64 random(20240607);
  std::vector<std::pair<Lease, std::uint64_t>> live;
  std::uint64_t mark = 0;
  std::size_t refused = 0;
  for (int round = 0; round < 4000; ++round) {
    std::vector<std::uint64_t> sizes(1 + random() % 4);
    for (auto& size : sizes) size = random() % (random() % 8 == 0 ? 2 * kMiB : 64 * 1024);
    std::uint64_t total = 0;
    for (const auto size : sizes) total += base::round_up(size, kPageBytes);
    const bool fits = slab.bytes_in_use() + total <= kCeiling;
    auto leases = lease(slab, sizes);
    ASSERT_EQ(leases.has_value(), fits) << "round " << round;
    ASSERT_LE(slab.bytes_mapped(), kCeiling);
    if (!leases) {
      ++refused;
      ASSERT_EQ(leases.error().code, ErrorCode::kTimeout);
    } else {
      for (Lease& each : *leases) {
        for (const auto& [other, other_mark] : live) {
          const bool apart = each.data() + each.bytes() <= other.data() ||
                             other.data() + other.bytes() <= each.data();
          ASSERT_TRUE(apart || each.bytes() == 0 || other.bytes() == 0) << "round " << round;
        }
        stamp(each, ++mark);
        live.emplace_back(std::move(each), mark);
      }
    }
    while (!live.empty() && random() % 3 != 0) {
      const std::size_t victim = random() % live.size();
      ASSERT_TRUE(stamped(live[victim].first, live[victim].second)) << "round " << round;
      std::swap(live[victim], live.back());
      live.pop_back();
    }
  }
  for (const auto& [each, each_mark] : live) EXPECT_TRUE(stamped(each, each_mark));
  EXPECT_GT(refused, 0u) << "the ceiling was never reached: the test tests little";
}

TEST_P(EverySlab, ThreadsNeverGetTheSameMemoryAndAllAreServed) {
  constexpr std::uint64_t kCeiling = kMiB;
  Slab slab(ceiling(kCeiling, GetParam()));
  std::atomic<bool> intact = true;
  std::vector<std::thread> threads;
  for (std::uint64_t id = 1; id <= 4; ++id) {
    threads.emplace_back([&, id] {
      std::mt19937_64 random(id);
      for (std::uint64_t round = 0; round < 300; ++round) {
        const std::vector<std::uint64_t> sizes = {random() % (kCeiling / 4), random() % 20'000};
        const auto leases = lease(slab, sizes, soon());
        if (!leases || slab.bytes_mapped() > kCeiling) {
          intact = false;
          return;
        }
        for (const Lease& each : *leases) stamp(each, id * 1000 + round);
        const Lease copy = (*leases)[0];
        for (const Lease& each : *leases) intact = intact && stamped(each, id * 1000 + round);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_TRUE(intact);
  EXPECT_EQ(slab.bytes_in_use(), 0u);
}

TEST_P(EverySlab, AWaiterIsWokenByTheReturnOfALease) {
  Slab slab(ceiling(kMiB, GetParam()));
  auto held = lease(slab, {kMiB});
  ASSERT_TRUE(held);
  std::latch started(1);
  std::thread waiter([&] {
    started.count_down();
    EXPECT_TRUE(lease(slab, {kMiB / 2}, soon()));
  });
  started.wait();
  held->clear();
  waiter.join();
}

TEST_P(EverySlab, AFullSlabTimesOutAndSaysWhoHoldsTheMemory) {
  Slab slab(ceiling(kMiB, GetParam()));
  const auto held = lease(slab, {kMiB});
  const auto refused =
      lease(slab, {4096}, std::chrono::steady_clock::now() + std::chrono::milliseconds(5));
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kTimeout);
  EXPECT_NE(refused.error().message.find("hold 1048576 of 1048576"), std::string::npos);
}

TEST_P(EverySlab, AWaiterCanBeInterruptedAndTakesNothing) {
  Slab slab(ceiling(kMiB, GetParam()));
  auto held = lease(slab, {kMiB}).value();
  const std::vector<std::uint64_t> sizes = {kMiB};
  base::Wait wait(soon(), [&] {
    EXPECT_EQ(slab.bytes_in_use(), kMiB);  // Asked without the slab's lock.
    return true;
  });
  EXPECT_EQ(slab.lease(sizes, wait).error().code, ErrorCode::kUnavailable);
  held.clear();
  EXPECT_EQ(slab.bytes_in_use(), 0u);
  EXPECT_TRUE(lease(slab, {kMiB}));
}

TEST_P(EverySlab, SeveralSizesAreGivenAllOrNone) {
  Slab slab(ceiling(kMiB, GetParam()));
  const auto held = lease(slab, {kMiB / 2});
  const std::uint64_t before = slab.bytes_in_use();
  EXPECT_FALSE(lease(slab, {4096, kMiB / 2}));
  EXPECT_EQ(slab.bytes_in_use(), before);
  EXPECT_TRUE(lease(slab, {4096, kMiB / 2 - 4096}));
}

TEST_P(EverySlab, WhatCanNeverFitIsRefusedAtOnce) {
  Slab slab(ceiling(kMiB, GetParam()));
  const auto refused = lease(slab, {kMiB, 1}, soon());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kMemoryLimit);
  EXPECT_EQ(lease(slab, {~0ull}, soon()).error().code, ErrorCode::kMemoryLimit);
  EXPECT_EQ(lease(slab, {~0ull / 2, ~0ull / 2, 8192}, soon()).error().code,
            ErrorCode::kMemoryLimit);
}

TEST_P(EverySlab, GenerationsOfAlternatingSizesAlwaysFitUnderACeilingOfTwo) {
  const std::vector<std::uint64_t> one = {3 * kMiB, kMiB, 5 * kMiB + 4096, 4096};
  const std::vector<std::uint64_t> two = {kMiB / 2, 4 * kMiB, 4 * kMiB, kMiB / 2 + 8192};
  std::uint64_t total = 0;
  for (const auto size : one) total += size;
  Slab slab(ceiling(2 * total, GetParam()));
  std::vector<std::vector<Lease>> held;
  for (int generation = 0; generation < 100; ++generation) {
    if (held.size() == 2) held.erase(held.begin() + generation % 2);
    auto leases = lease(slab, generation % 3 == 0 ? one : two);
    ASSERT_TRUE(leases) << "generation " << generation;
    held.push_back(*std::move(leases));
    ASSERT_LE(slab.bytes_mapped(), 2 * total);
  }
}

TEST_P(EverySlab, ScatteredHolesDoNotKeepAFittingRequestFromSucceeding) {
  Slab slab(ceiling(64 * 4096, GetParam()));
  auto pages = lease(slab, std::vector<std::uint64_t>(64, 4096));
  ASSERT_TRUE(pages);
  std::vector<Lease> kept;
  for (std::size_t i = 0; i < 64; i += 2) kept.push_back((*pages)[i]);
  pages->clear();  // 32 holes of a page each.
  const auto whole = lease(slab, {32 * 4096});
  ASSERT_TRUE(whole);
  EXPECT_EQ(slab.bytes_mapped(), 64u * 4096);
}

TEST_P(EverySlab, RepeatedGenerationsUseTheSamePagesAgain) {
  int questions = 0;
  Slab slab(with_free_memory(
      [&] {
        ++questions;
        return 100 * kMiB;
      },
      10 * kMiB, GetParam()));
  const std::vector<std::uint64_t> sizes = {kMiB, 3 * kMiB, 4096};
  std::vector<Lease> first = lease(slab, sizes).value();
  std::vector<Lease> second = lease(slab, sizes).value();
  const std::uint64_t mapped = slab.bytes_mapped();
  const int asked = questions;
  for (int i = 0; i < 50; ++i) {
    first = {};
    first = lease(slab, sizes).value();
    second = {};
    second = lease(slab, sizes).value();
  }
  EXPECT_EQ(slab.bytes_mapped(), mapped);
  EXPECT_EQ(questions, asked) << "memory was mapped again";
}

TEST_P(EverySlab, ALeaseOutlivesItsSlab) {
  auto slab = std::make_unique<Slab>(ceiling(kMiB, GetParam()));
  std::vector<Lease> leases = lease(*slab, {kMiB / 2, kMiB / 4}).value();
  stamp(leases[0], 7);
  slab.reset();
  stamp(leases[1], 8);
  EXPECT_TRUE(stamped(leases[0], 7));
}

TEST(Slab, TheDefaultCeilingIsTwoGenerationsAndNeverSinks) {
  Slab slab(with_free_memory([] { return 60 * kMiB; }));
  EXPECT_EQ(slab.host_bytes_max(), 0u);
  ASSERT_TRUE(slab.adapt(10 * kMiB));
  EXPECT_EQ(slab.host_bytes_max(), 20 * kMiB);
  ASSERT_TRUE(slab.adapt(kMiB));
  EXPECT_EQ(slab.host_bytes_max(), 20 * kMiB);
}

TEST(Slab, TheDefaultCeilingIsAtMostHalfOfWhatIsFreeOrMappedAlready) {
  std::uint64_t host = 60 * kMiB;
  Slab slab(with_free_memory([&] { return host; }));
  ASSERT_TRUE(slab.adapt(100 * kMiB));
  EXPECT_EQ(slab.host_bytes_max(), 30 * kMiB);
  const auto held = lease(slab, {20 * kMiB});
  ASSERT_TRUE(held);
  host = 50 * kMiB;
  ASSERT_TRUE(slab.adapt(100 * kMiB));
  EXPECT_EQ(slab.host_bytes_max(), 35 * kMiB);
}

TEST(Slab, TheCeilingOfHalfOfWhatIsFreeIsReadAgainOnlyWhenAStateDoesNotFit) {
  std::uint64_t host = 60 * kMiB;
  int questions = 0;
  Slab::Options options = with_free_memory([&] {
    ++questions;
    return host;
  });
  options.default_ceiling = DefaultCeiling::kHalfOfFree;
  Slab slab(std::move(options));
  ASSERT_TRUE(slab.adapt(kMiB));
  EXPECT_EQ(slab.host_bytes_max(), 30 * kMiB);
  const auto held = lease(slab, {20 * kMiB});
  ASSERT_TRUE(held);
  const int asked = questions;
  host = 80 * kMiB;
  ASSERT_TRUE(slab.adapt(10 * kMiB));
  EXPECT_EQ(questions, asked);
  EXPECT_EQ(slab.host_bytes_max(), 30 * kMiB);
  ASSERT_TRUE(slab.adapt(10 * kMiB + 1));
  EXPECT_EQ(slab.host_bytes_max(), 97 * kMiB / 2) << "half of 77 MiB free and 20 MiB mapped";
  host = kMiB;
  ASSERT_TRUE(slab.adapt(~0ull));
  EXPECT_EQ(slab.host_bytes_max(), 97 * kMiB / 2) << "it sank";
}

TEST(Slab, AFixedCeilingIsNotAdapted) {
  Slab slab(ceiling(kMiB));
  ASSERT_TRUE(slab.adapt(100 * kMiB));
  EXPECT_EQ(slab.host_bytes_max(), kMiB);
}

TEST_P(EverySlab, ARetiredSlabKeepsNothingThatNobodyHolds) {
  Slab slab(ceiling(kMiB, GetParam()));
  std::vector<Lease> held = lease(slab, {4096, 8192, 4096}).value();
  held.pop_back();
  EXPECT_EQ(slab.bytes_mapped(), 16384u);
  slab.retire();
  EXPECT_EQ(slab.bytes_mapped(), 12288u);
  held.erase(held.begin());
  EXPECT_EQ(slab.bytes_mapped(), 8192u);
  EXPECT_TRUE(lease(slab, {4096}));
  held.clear();
  EXPECT_EQ(slab.bytes_mapped(), 0u);
}

TEST_P(EverySlab, GrowthBeyondFreeMemoryIsRefusedWithBothFigures) {
  Slab slab(with_free_memory([] { return 3 * kMiB; }, 100 * kMiB, GetParam()));
  const auto refused = lease(slab, {4 * kMiB}, soon());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kMemoryLimit);
  EXPECT_NE(refused.error().message.find(std::to_string(3 * kMiB)), std::string::npos);
  EXPECT_NE(refused.error().message.find("/job has " + std::to_string(77 * kMiB)),
            std::string::npos);
  EXPECT_EQ(slab.bytes_mapped(), 0u);
}

TEST_P(EverySlab, WithTooLittleFreeMemoryAWaiterGetsWhatEarlierLeasesGiveBack) {
  std::uint64_t host = 100 * kMiB;
  Slab slab(with_free_memory([&] { return host; }, 100 * kMiB, GetParam()));
  auto held = lease(slab, {4 * kMiB});
  host = kMiB;
  EXPECT_EQ(lease(slab, {4 * kMiB}).error().code, ErrorCode::kTimeout);
  EXPECT_EQ(lease(slab, {6 * kMiB}, soon()).error().code, ErrorCode::kMemoryLimit);
  held->clear();
  EXPECT_TRUE(lease(slab, {4 * kMiB}));
  EXPECT_TRUE(lease(slab, {5 * kMiB})) << "4 MiB free, of which none fits, and 1 MiB to grow";
}

TEST(Slab, UnreadableFreeMemoryIsReported) {
  Slab::Options options;
  options.host_memory = []() -> Result<HostMemory> {
    return failure(ErrorCode::kIo, "no meminfo");
  };
  Slab slab(std::move(options));
  EXPECT_EQ(slab.adapt(1).error().message, "no meminfo");
}

TEST_P(EverySlab, MemoryThatTheKernelRefusesIsAnErrorAndLosesNothing) {
  Slab::Options options = ceiling(1ull << 61, GetParam());
  options.host_memory = []() -> Result<HostMemory> {
    return HostMemory{.host_bytes_free = 1ull << 62, .cgroup_bytes_free = 1ull << 62, .cgroup = {}};
  };
  Slab slab(std::move(options));
  const auto refused = lease(slab, {4096, 1ull << 60});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kMemoryLimit);
  EXPECT_NE(refused.error().system_errno, 0);
  EXPECT_EQ(slab.bytes_in_use(), 0u);
  EXPECT_TRUE(lease(slab, {4096}));
}

TEST_P(EverySlab, AForkedChildLeavesTheParentsSlabAlone) {
  auto slab = std::make_unique<Slab>(ceiling(kMiB, GetParam()));
  std::vector<Lease> leases = lease(*slab, {4096}).value();
  stamp(leases[0], 3);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    leases.clear();
    slab.reset();
    ::_exit(0);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(stamped(leases[0], 3));
}

// Random stagings, of which any may be held by another process (here: by a lock of its kind).
TEST(Slab, LeasesNeverOverlapWhatOtherProcessesHold) {
  struct Foreign {
    std::uint64_t offset;
    std::uint64_t bytes;
  };
  Slab slab(ceiling(4 * kMiB, true));
  std::mt19937_64 random(7);
  const Lease probe = lease(slab, {4096}).value()[0];
  const SharedRange file = share(probe.data(), 1).value();
  const std::byte* const base = probe.data() - file.offset;
  const std::string path = "/proc/self/fd/" + std::to_string(file.descriptor);
  const base::UniqueFd other(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_TRUE(other);
  std::vector<Lease> held;
  std::vector<Foreign> foreign;
  const auto size = [](std::uint64_t bytes) { return (bytes + 4095) / 4096 * 4096; };
  std::size_t refused = 0;
  for (int round = 0; round < 4000; ++round) {
    const std::uint64_t bytes = 1 + random() % (random() % 8 == 0 ? kMiB : 32 * 1024);
    auto made = lease(slab, {bytes});
    if (made) {
      const auto offset = static_cast<std::uint64_t>(made->at(0).data() - base);
      for (const Lease& each : held) {
        const auto begin = static_cast<std::uint64_t>(each.data() - base);
        ASSERT_TRUE(offset + size(bytes) <= begin || begin + size(each.bytes()) <= offset);
      }
      for (const Foreign& each : foreign) {
        ASSERT_TRUE(offset + size(bytes) <= each.offset || each.offset + each.bytes <= offset)
            << "round " << round;
      }
      held.push_back(made->at(0));
    } else {
      ++refused;
    }
    if (!held.empty() && random() % 2 == 0) {
      const std::size_t victim = random() % held.size();
      std::swap(held[victim], held.back());
      if (random() % 3 == 0) {
        foreign.push_back({.offset = static_cast<std::uint64_t>(held.back().data() - base),
                           .bytes = size(held.back().bytes())});
        ASSERT_EQ(lock_range(other.get(), RangeLock::kShared, foreign.back().offset,
                             foreign.back().bytes),
                  0);
      }
      held.pop_back();
    }
    if (!foreign.empty() && random() % 4 == 0) {
      unlock_range(other.get(), foreign.back().offset, foreign.back().bytes);
      foreign.pop_back();
    }
  }
  EXPECT_GT(refused, 0u);
}

TEST(Slab, AForkedChildReadsLeasesWhereTheyAreInherited) {
  Slab::Options options = ceiling(kMiB, false);
  options.inherited = true;
  Slab slab(std::move(options));
  std::vector<Lease> leases = lease(slab, {4096}).value();
  stamp(leases[0], 3);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) ::_exit(stamped(leases[0], 3) ? 0 : 1);
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace strandline::memory
