// Whatever the state: what was staged is what was there at the call.
//
// Random states of random views over random storages are staged; right afterwards every storage is
// overwritten or freed, and results are held or dropped at random. Each result must be, as long as
// it is held, bit for bit what its state was, with the same geometry and the same tensors sharing
// the same bytes. A failure names its seed.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "staging/copy_workers.h"
#include "staging/stager_impl.h"
#include "strandline/stager.h"
#include "testing/checkpoint_fixture.h"
#include "testing/fake_device.h"
#include "testing/manual_executor.h"

namespace strandline::testing {
namespace {

using Bytes = std::vector<std::byte>;

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  // In [0, below).
  std::uint64_t below(std::uint64_t limit) { return engine_() % limit; }
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(below(static_cast<std::uint64_t>(high - low + 1)));
  }
  bool one_in(std::uint64_t count) { return below(count) == 0; }
  void fill(Bytes& bytes) {
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(engine_());
  }

 private:
  std::mt19937_64 engine_;
};

constexpr DType kTypes[] = {DType::kU8,  DType::kBool, DType::kI16, DType::kBF16,  DType::kF32,
                            DType::kI64, DType::kF64,  DType::kC64, DType::kF8E5M2};

// A view somewhere in a storage: any strides, zero and negative ones included.
TensorView random_view(Random& random, Bytes& storage) {
  while (true) {
    TensorView view;
    view.dtype = kTypes[random.below(std::size(kTypes))];
    const auto size = static_cast<std::int64_t>(dtype_bits(view.dtype) / 8);
    const std::uint64_t dimensions = random.below(4);
    for (std::uint64_t i = 0; i < dimensions; ++i) {
      view.shape.push_back(random.one_in(12) ? 0 : 1 + random.below(9));
      view.strides_bytes.push_back(random.between(-12, 24) * size);
    }
    view.storage_base = storage.data();
    view.storage_bytes = storage.size();
    const auto [low, high] = view.reach_bytes();
    const auto room = static_cast<std::int64_t>(storage.size()) - (high - low);
    if (room < 0 || (storage.empty() && high > low)) continue;
    view.data = storage.data() + (random.between(0, room) - low) / size * size;
    view.conjugate = view.dtype == DType::kC64 && random.one_in(3);
    view.negative = random.one_in(5);
    view.framework = random.one_in(2) ? "torch" : "";
    if (view.check()) return view;
  }
}

// A tensor's bytes as they lie, conjugate and negative bits left alone.
Bytes raw_bytes(TensorView view) {
  view.conjugate = false;
  view.negative = false;
  view.device = {};
  return bytes_of(view);
}

struct Sample {
  explicit Sample(Random& random) {
    storages.resize(1 + random.below(6));
    for (Bytes& storage : storages) {
      storage.resize(random.one_in(10) ? 0 : 1 + random.below(random.one_in(4) ? 300'000 : 3000));
      random.fill(storage);
    }
    StateDictBuilder builder(random.one_in(2) ? NodeKind::kDict : NodeKind::kOrderedDict);
    const std::uint64_t count = random.below(20);
    for (std::uint64_t i = 0; i < count; ++i) {
      const bool nested = random.one_in(3);
      const std::string name = std::to_string(i);
      if (nested) must(builder.begin(name, random.one_in(2) ? NodeKind::kList : NodeKind::kDict));
      if (random.one_in(5)) must(builder.value("value" + name, Value(name)));
      Bytes& storage = storages[random.below(storages.size())];
      must(builder.tensor("tensor" + name, random_view(random, storage)));
      expected.push_back({});
      if (nested) must(builder.end());
    }
    state = must(builder.finish());
    for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = raw_bytes(state.tensors()[i]);
  }

  // What training does right after stage() has returned.
  void go_on(Random& random) {
    for (Bytes& storage : storages) {
      random.fill(storage);
      if (random.one_in(2)) Bytes().swap(storage);
    }
  }

  std::vector<Bytes> storages;
  StateDict state;  // Its views dangle after go_on(); where they were is still known.
  std::vector<Bytes> expected;
};

void expect_same_bytes(const StateDict& staged, const std::vector<Bytes>& expected) {
  ASSERT_EQ(staged.tensors().size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    ASSERT_EQ(raw_bytes(staged.tensors()[i]), expected[i]) << "tensor " << i;
  }
}

void expect_same_geometry(const StateDict& staged, const StateDict& state) {
  for (std::size_t i = 0; i < state.tensors().size(); ++i) {
    const TensorView& now = staged.tensors()[i];
    const TensorView& then = state.tensors()[i];
    ASSERT_TRUE(now.check()) << now.check().error().text();
    ASSERT_EQ(now.shape, then.shape);
    ASSERT_EQ(now.strides_bytes, then.strides_bytes);
    ASSERT_EQ(now.dtype, then.dtype);
    ASSERT_EQ(now.conjugate, then.conjugate);
    ASSERT_EQ(now.negative, then.negative);
    ASSERT_EQ(now.framework, then.framework);
    if (then.element_count() == 0) continue;
    ASSERT_LE(now.storage_bytes, then.storage_bytes);
    if (now.storage_bytes == then.storage_bytes) {
      ASSERT_EQ(now.data - now.storage_base, then.data - then.storage_base);
    }
    for (std::size_t j = 0; j < i; ++j) {
      if (state.tensors()[j].element_count() == 0) continue;
      const bool same = state.tensors()[j].storage_base == then.storage_base;
      ASSERT_EQ(staged.tensors()[j].storage_base == now.storage_base, same);
      if (same) {
        ASSERT_EQ(now.data - staged.tensors()[j].data, then.data - state.tensors()[j].data);
      }
    }
  }
}

struct Held {
  StateDict staged;
  std::vector<Bytes> expected;
};

class StagerProperty : public ::testing::TestWithParam<bool> {};

TEST_P(StagerProperty, AResultIsTheStateAtTheCallForAsLongAsItIsHeld) {
  StateDictStager stager = must(StateDictStager::open(
      {.share_memory = GetParam(), .host_bytes_max = 8 << 20, .copy_threads = 2}));
  std::vector<Held> held;
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    Sample sample(random);
    StateDict staged = must(stager.stage(sample.state));
    sample.go_on(random);
    ASSERT_NO_FATAL_FAILURE(expect_same_bytes(staged, sample.expected));
    ASSERT_NO_FATAL_FAILURE(expect_same_geometry(staged, sample.state));
    held.push_back({std::move(staged), std::move(sample.expected)});
    while (held.size() > 3 || (!held.empty() && random.one_in(3))) {
      const auto dropped = held.begin() + random.between(0, static_cast<int>(held.size()) - 1);
      ASSERT_NO_FATAL_FAILURE(expect_same_bytes(dropped->staged, dropped->expected));
      held.erase(dropped);
    }
  }
}

TEST_P(StagerProperty, DevicesThatCopyInAnyOrderGiveTheSameAndHostTensorsAreTakenAtTheCall) {
  const auto fake = std::make_shared<FakeDevice>();
  auto devices = std::make_shared<device::Registry>();
  devices->add(fake);
  const auto watcher = std::make_shared<ManualExecutor>();
  DefaultStager stager = must(StagerAccess::open(
      CheckpointStagerConfig{.use_shared_memory = GetParam(), .host_bytes_max = 8 << 20},
      staging::StagerParts{.clock = std::make_shared<base::SystemClock>(),
                           .devices = devices,
                           .workers = must(staging::start_copy_workers(2)),
                           .watcher = watcher}));
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    Sample on_host(random);
    Sample on_device(random);
    for (TensorView& view : on_device.state.tensors()) view.device.kind = "fake";
    const StateDict both{{"host", on_host.state}, {"device", on_device.state}};
    const Future<StateDict> future = must(stager.stage(both));
    on_host.go_on(random);
    while (fake->pending() > 0) {
      ASSERT_FALSE(future.ready());
      ASSERT_TRUE(random.one_in(2) ? fake->complete_newest() : fake->complete_oldest());
    }
    const StateDict staged = must(future.get(std::chrono::milliseconds(0)));
    std::vector<Bytes> expected = std::move(on_host.expected);
    for (Bytes& bytes : on_device.expected) expected.push_back(std::move(bytes));
    ASSERT_NO_FATAL_FAILURE(expect_same_bytes(staged, expected));
    ASSERT_NO_FATAL_FAILURE(expect_same_geometry(staged, both));
    watcher->run_all();
  }
}

INSTANTIATE_TEST_SUITE_P(PrivateAndShared, StagerProperty, ::testing::Bool(),
                         [](const auto& shared) { return shared.param ? "shared" : "private"; });

}  // namespace
}  // namespace strandline::testing
