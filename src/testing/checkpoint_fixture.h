// What tests of whole checkpoints share: a small job, its content as text, shorthands.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "device/host_device.h"
#include "strandline/checkpointer.h"
#include "testing/fault_injecting_storage.h"
#include "testing/temporary_directory.h"

namespace strandline::testing {

// Longer than any wait that succeeds; a test that reaches it has found a hang.
inline constexpr std::chrono::seconds kPatience{60};

// The value, or the end of the test.
template <typename T>
T must(Result<T> result) {
  if (!result) throw std::runtime_error(result.error().text());
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}

// The error, or the end of the test.
template <typename T>
Error must_fail(const Result<T>& result) {
  if (result) throw std::runtime_error("succeeded, though it should have failed");
  return result.error();
}

// A job of several groups with tied weights, strides, plain values and an empty tensor. Jobs of
// different seeds differ in every tensor and value.
struct Job {
  explicit Job(std::int64_t seed) : epoch(seed) {
    for (std::size_t i = 0; i < weights.size(); ++i) {
      weights[i] = static_cast<float>(seed * 1000) + static_cast<float>(i);
    }
    for (std::size_t i = 0; i < moments.size(); ++i) {
      moments[i] = static_cast<double>(seed) / (static_cast<double>(i) + 1);
    }
    for (std::size_t i = 0; i < rng.size(); ++i) {
      rng[i] = static_cast<std::uint8_t>(static_cast<std::size_t>(seed) * 7 + i);
    }
  }

  // Borrows the job's memory.
  StateDict state() {
    TensorView transposed = TensorView::of(moments, {8, 4});
    std::swap(transposed.shape[0], transposed.shape[1]);
    std::swap(transposed.strides_bytes[0], transposed.strides_bytes[1]);
    return StateDict{{"model", StateDict{{"embedding", TensorView::of(weights, {6, 8})},
                                         {"head", TensorView::of(weights, {6, 8})}}},
                     {"optimizer", StateDict{{"moments", std::move(transposed)},
                                             {"lr", 0.5 / static_cast<double>(epoch + 1)}}},
                     {"rng", TensorView::of(rng)},
                     {"nothing", TensorView::of(nothing)},
                     {"epoch", epoch}};
  }

  std::vector<float> weights = std::vector<float>(48);
  std::vector<double> moments = std::vector<double>(32);
  std::vector<std::uint8_t> rng = std::vector<std::uint8_t>(40);
  std::vector<float> nothing;
  std::int64_t epoch = 0;
};

// Every bit of a plain value.
inline std::string value_bits(const Value& value) {  // NOLINT(misc-no-recursion)
  std::string text = fmt::format("#{}:", value.data().index());
  if (const auto* number = value.get_if<double>()) {
    return text + fmt::format("{:016x}", std::bit_cast<std::uint64_t>(*number));
  }
  if (const auto* list = value.get_if<Value::List>()) {
    for (const Value& item : *list) text += value_bits(item) + ",";
    return text + "]";
  }
  if (const auto* tagged = value.get_if<Value::Tagged>()) {
    text += tagged->tag;
    for (const Value& field : tagged->fields) text += value_bits(field) + ",";
    return text + ")";
  }
  return text + value.text();
}

// The bytes of a tensor in row-major order.
inline std::vector<std::byte> bytes_of(const TensorView& view) {
  std::vector<std::byte> bytes(view.byte_count());
  device::HostDevice host;
  Status gathered;
  host.copy_to_host_async(view, 0, bytes, [&](Status status) { gathered = std::move(status); });
  must(gathered);
  return bytes;
}

// Everything that a state holds, one line a node: equal texts mean equal states, bit for bit.
inline std::vector<std::string> content_of(const StateDict& state) {
  std::vector<std::string> lines;
  const Structure& structure = state.structure();
  for (std::uint32_t i = 0; i < structure.nodes().size(); ++i) {
    const Structure::Node& node = structure.nodes()[i];
    std::string line =
        fmt::format("{} key {} kind {}{}", structure.path_text(i), value_bits(node.key),
                    static_cast<int>(node.kind), node.metadata ? " metadata" : "");
    if (node.kind == NodeKind::kTensor) {
      const TensorView& view = state.tensors()[node.leaf];
      line += fmt::format(" {} [{}] ", dtype_name(view.dtype), fmt::join(view.shape, ","));
      for (const std::byte byte : bytes_of(view)) {
        line += fmt::format("{:02x}", static_cast<unsigned>(byte));
      }
    } else if (node.kind == NodeKind::kValue) {
      line += " = " + value_bits(state.values()[node.leaf]);
    }
    lines.push_back(std::move(line));
  }
  return lines;
}

inline std::vector<std::string> content_of(Job& job) { return content_of(job.state()); }

// A storage in `root` that fails when the test says so.
inline std::shared_ptr<FaultInjectingStorage> faulty_storage(const std::filesystem::path& root) {
  return std::make_shared<FaultInjectingStorage>(must(open_posix_storage(root)));
}

// Saves and waits: the outcome, or the error of either.
inline Result<Outcome> save_durably(Checkpointer& checkpointer, std::int64_t step, Job& job,
                                    const SaveOptions& options = {}) {
  const Result<Save> save = checkpointer.save(step, job.state(), options);
  if (!save) return failure(save.error());
  return save->wait_durable(kPatience);
}

// Commits steps in a directory, each with the content of the job of that seed.
inline void commit_steps(const std::filesystem::path& directory,
                         const std::vector<std::int64_t>& steps, CheckpointerOptions options = {}) {
  Checkpointer checkpointer = must(Checkpointer::open(directory, std::move(options)));
  for (const std::int64_t step : steps) {
    Job job(step);
    must(save_durably(checkpointer, step, job));
  }
  must(checkpointer.close());
}

inline std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline void write_text(const std::filesystem::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
}

// Names in a directory, sorted; all but the lock.
inline std::vector<std::string> names_in(const std::filesystem::path& directory) {
  std::vector<std::string> names;
  if (!std::filesystem::exists(directory)) return names;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.path().filename() != ".lock") names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace strandline::testing
