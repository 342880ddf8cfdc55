// Saves steps with content that follows from a seed, and tells what it finds; killed by the driver.
//
//   saver save [--threads] [--keep=N] [--overwrite] DIRECTORY STEP=SEED...
//       Saves each and waits for it. Right before the last one it makes a harmless system call that
//       the driver finds in its recording, and another one right after it. Prints one line a save.
//   saver resume DIRECTORY STEP=SEED
//       Restores the newest good checkpoint, prints its step and seed, and saves another one.
//
// Exits with 0, or with 3 if content is not what was saved, or 2 on any other error. Everything
// runs on one thread, so that each run makes the same system calls; with --threads as in
// production.

#include <sys/syscall.h>
#include <unistd.h>

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/environment.h"
#include "strandline/checkpointer.h"
#include "testing/manual_executor.h"

namespace {

using namespace strandline;  // NOLINT(google-build-using-namespace)

constexpr std::chrono::minutes kPatience(2);
// No process has these numbers: getpgid() fails and does nothing else.
constexpr int kBeginMark = 2147480001;
constexpr int kEndMark = 2147480002;

void mark(int number) { static_cast<void>(::syscall(SYS_getpgid, number)); }

struct Job {
  explicit Job(std::int64_t number) : seed(number) {
    for (std::size_t i = 0; i < weights.size(); ++i) {
      weights[i] = static_cast<std::uint32_t>(i) * 2654435761u + static_cast<std::uint32_t>(seed);
    }
    for (std::size_t i = 0; i < moments.size(); ++i) {
      moments[i] = static_cast<double>(seed) / static_cast<double>(i + 1);
    }
  }
  StateDict state() {
    return StateDict{{"model", StateDict{{"weights", TensorView::of(weights)}}},
                     {"optimizer", StateDict{{"moments", TensorView::of(moments)}}},
                     {"seed", seed}};
  }

  std::int64_t seed;
  std::vector<std::uint32_t> weights = std::vector<std::uint32_t>(200'000);
  std::vector<double> moments = std::vector<double>(1'000);
};

struct Wanted {
  std::int64_t step = 0;
  std::int64_t seed = 0;
};

struct Arguments {
  std::string verb;
  bool threads = false;
  bool overwrite = false;
  std::optional<std::uint32_t> keep;
  std::string directory;
  std::vector<Wanted> saves;
};

template <typename T>
T number(std::string_view text) {
  T value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

Arguments parse(int count, char** texts) {
  Arguments arguments;
  arguments.verb = count > 1 ? texts[1] : "";
  for (int i = 2; i < count; ++i) {
    const std::string_view text = texts[i];
    const std::size_t equals = text.find('=');
    if (text == "--threads") {
      arguments.threads = true;
    } else if (text == "--overwrite") {
      arguments.overwrite = true;
    } else if (text.starts_with("--keep=")) {
      arguments.keep = number<std::uint32_t>(text.substr(7));
    } else if (arguments.directory.empty()) {
      arguments.directory = text;
    } else {
      arguments.saves.push_back({number<std::int64_t>(text.substr(0, equals)),
                                 number<std::int64_t>(text.substr(equals + 1))});
    }
  }
  return arguments;
}

int complain(const Error& error) {
  std::printf("error %d %s\n", error.system_errno, error.text().c_str());
  return 2;
}

// The engine, on one thread unless told otherwise.
struct Engine {
  std::shared_ptr<testing::ManualExecutor> pipeline;
  std::optional<Checkpointer> checkpointer;

  Status open(const Arguments& arguments) {
    CheckpointerOptions options;
    options.keep = arguments.keep;
    auto storage = open_posix_storage(arguments.directory);
    if (!storage) return failure(storage.error());
    checkpoint::Environment environment;
    if (arguments.threads) {
      environment = checkpoint::make_environment(std::nullopt).value();
    } else {
      pipeline = std::make_shared<testing::ManualExecutor>();
      environment.clock = std::make_shared<base::SystemClock>();
      environment.devices = std::make_shared<device::Registry>();
      environment.pipeline = pipeline;
    }
    auto opened = CheckpointerAccess::open(*storage, options, std::move(environment));
    if (!opened) return failure(opened.error());
    checkpointer = std::move(*opened);
    return {};
  }

  Result<Outcome> save(const Wanted& wanted, bool overwrite) {
    Job job(wanted.seed);
    SaveOptions options;
    options.overwrite = overwrite;
    auto save = checkpointer->save(wanted.step, job.state(), options);
    if (!save) return failure(save.error());
    if (pipeline) pipeline->run_all();
    return save->wait_durable(kPatience);
  }
};

int save(const Arguments& arguments) {
  Engine engine;
  if (Status opened = engine.open(arguments); !opened) return complain(opened.error());
  for (std::size_t i = 0; i < arguments.saves.size(); ++i) {
    const bool last = i + 1 == arguments.saves.size();
    if (last) mark(kBeginMark);
    const Result<Outcome> outcome = engine.save(arguments.saves[i], arguments.overwrite);
    if (last) mark(kEndMark);
    if (!outcome) return complain(outcome.error());
    std::printf("committed %lld\n", static_cast<long long>(arguments.saves[i].step));
  }
  const Status closed = engine.checkpointer->close();
  return closed ? 0 : complain(closed.error());
}

int resume(const Arguments& arguments) {
  Engine engine;
  if (Status opened = engine.open(arguments); !opened) return complain(opened.error());
  Job job(0);
  StateDict state = job.state();
  const auto restored = engine.checkpointer->restore(state);
  if (!restored) return complain(restored.error());
  if (!*restored) {
    std::printf("nothing\n");
  } else {
    const auto seed = state.value("seed");
    const Job expected(*seed->get_if<std::int64_t>());
    if (job.weights != expected.weights || job.moments != expected.moments) return 3;
    std::printf("restored %lld %lld warnings %zu\n", static_cast<long long>((*restored)->step),
                static_cast<long long>(expected.seed), (*restored)->warnings.size());
  }
  const Wanted next = arguments.saves.front();
  const Result<Outcome> outcome = engine.save(next, arguments.overwrite);
  if (!outcome) return complain(outcome.error());
  std::printf("committed %lld\n", static_cast<long long>(next.step));
  const Status closed = engine.checkpointer->close();
  return closed ? 0 : complain(closed.error());
}

}  // namespace

int main(int count, char** texts) {
  const Arguments arguments = parse(count, texts);
  if (arguments.directory.empty() || arguments.saves.empty()) return 2;
  if (arguments.verb == "save") return save(arguments);
  if (arguments.verb == "resume") return resume(arguments);
  return 2;
}
