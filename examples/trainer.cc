// A training job that can be killed at any moment and goes on bit for bit: logistic regression by
// momentum SGD, on plain arrays.
//
//   strandline_trainer DIRECTORY [--steps N] [--save-every K] [--features F]
//
// Run it, kill it, run it again: it goes on from the newest committed checkpoint, and prints the
// losses that it would have printed (as hexadecimal floats, so that every bit shows).

#include <strandline/checkpointer.h>

#include <charconv>
#include <cmath>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

namespace {

using strandline::StateDict, strandline::TensorView;

constexpr std::size_t kBatch = 8;

struct Options {
  std::string directory;
  std::int64_t steps = 100;
  std::int64_t save_every = 10;
  std::int64_t features = 64;
};

// All that the next step depends on is in state(); what is not, is lost with the process. So the
// random generator and the learning rate belong there as much as the weights do.
class Job {
 public:
  explicit Job(std::size_t features) : weights_(features), momentum_(features) {}

  // Tensors are views of our memory: save() copies it, restore() writes into it.
  StateDict state() {
    return {{"model", StateDict{{"weights", TensorView::of(weights_)}}},
            {"optimizer",
             StateDict{{"momentum", TensorView::of(momentum_)}, {"learning_rate", learning_rate_}}},
            {"random", TensorView::of(random_)}};
  }

  // Plain values are copies: those that restore() put into `state` have to be fetched from there.
  void take_values(const StateDict& state) {
    const auto rate = state.value("optimizer.learning_rate");
    if (rate && rate->get_if<double>() != nullptr) learning_rate_ = *rate->get_if<double>();
  }

  // One step on a fresh batch, whose mean loss it returns.
  float train() {
    std::vector<float> gradient(weights_.size()), input(weights_.size());
    float loss = 0;
    for (std::size_t sample = 0; sample < kBatch; ++sample) {
      for (float& value : input) value = uniform();
      const float label = input.front() > 0 ? 1.0f : -1.0f;
      float margin = 0;
      for (std::size_t i = 0; i < input.size(); ++i) margin += label * weights_[i] * input[i];
      loss += std::log1p(std::exp(-margin)) / kBatch;
      const float slope = -label / (1 + std::exp(margin)) / kBatch;
      for (std::size_t i = 0; i < input.size(); ++i) gradient[i] += slope * input[i];
    }
    const auto rate = static_cast<float>(learning_rate_ / static_cast<double>(weights_.size()));
    for (std::size_t i = 0; i < gradient.size(); ++i) {
      momentum_[i] = 0.9f * momentum_[i] + gradient[i];
      weights_[i] -= rate * momentum_[i];
    }
    learning_rate_ *= 0.999;
    return loss;
  }

 private:
  // Between -1 and 1, from the high bits of a linear congruential generator.
  float uniform() {
    random_[0] = random_[0] * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<float>(random_[0] >> 40) / 8388608.0f - 1;
  }

  std::vector<float> weights_;
  std::vector<float> momentum_;
  double learning_rate_ = 4;
  std::vector<std::uint64_t> random_{20'260'101};
};

int report(const strandline::Error& error) {
  std::fprintf(stderr, "strandline_trainer: %s\n", error.text().c_str());
  return 1;
}

void warn(const std::vector<std::string>& warnings) {
  for (const std::string& text : warnings) std::fprintf(stderr, "warning: %s\n", text.c_str());
}

int run(const Options& options) {
  auto checkpointer = strandline::Checkpointer::open(options.directory, {.keep = 3});
  if (!checkpointer) return report(checkpointer.error());

  Job job(static_cast<std::size_t>(options.features));
  StateDict state = job.state();
  auto restored = checkpointer->restore(state);
  if (!restored) return report(restored.error());
  std::int64_t done = 0;  // Steps completed.
  if (*restored) {
    done = (*restored)->step;
    job.take_values(state);
    warn((*restored)->warnings);
    std::printf("restored step %lld\n", static_cast<long long>(done));
  }

  while (done < options.steps) {
    const float loss = job.train();
    ++done;
    std::printf("step %lld loss %a\n", static_cast<long long>(done), loss);
    if (done % options.save_every != 0) continue;
    // Returns as soon as the state is copied; it is written while the next steps are trained.
    auto save = checkpointer->save(done, job.state(), {.metrics = {{"loss", loss}}});
    if (!save) return report(save.error());
    warn(save->warnings());
    std::printf("saving step %lld\n", static_cast<long long>(done));
  }
  // Waits until the last save is durable, and tells what failed in the background.
  const auto closed = checkpointer->close();
  return closed ? 0 : report(closed.error());
}

bool parse(int argc, char** argv, Options& options) {
  if (argc < 2 || argc % 2 != 0 || argv[1][0] == '-') return false;
  options.directory = argv[1];
  for (int i = 2; i < argc; i += 2) {
    const std::string_view name = argv[i], text = argv[i + 1];
    std::int64_t* number = name == "--steps"        ? &options.steps
                           : name == "--save-every" ? &options.save_every
                           : name == "--features"   ? &options.features
                                                    : nullptr;
    if (number == nullptr) return false;
    const auto [end, error] = std::from_chars(text.begin(), text.end(), *number);
    if (error != std::errc() || end != text.end() || *number < 1) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // Whoever reads a pipe sees each line at once.
  Options options;
  if (parse(argc, argv, options)) return run(options);
  std::fputs("usage: strandline_trainer DIRECTORY [--steps N] [--save-every K] [--features F]\n",
             stderr);
  return 2;
}
