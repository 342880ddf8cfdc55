#include "testing/fault_injecting_storage.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <utility>

#include "base/mutex.h"
#include "base/result_macros.h"
#include "base/system_error.h"

namespace strandline::testing {

// What is to fail and what was called; shared by the storage and all that it handed out.
class FaultPlan {
 public:
  using Call = FaultInjectingStorage::Call;

  // Counts a call and gives its error if it is to fail.
  Status admit(std::string_view operation, std::string name) STRANDLINE_EXCLUDES(mutex_) {
    Call call{.operation = std::string(operation), .name = std::move(name)};
    std::function<void(const Call&)> hook;
    {
      base::MutexLock lock(mutex_);
      call.number = log_.size() + 1;
      log_.push_back(call);
      hook = hook_;
    }
    if (hook) hook(call);

    base::MutexLock lock(mutex_);
    const std::optional<int> system_errno = fault_of(call);
    if (!system_errno) return {};
    log_[call.number - 1].failed = true;
    return failure(base::system_error(call.operation, call.name, *system_errno));
  }

  void fail_call(std::uint64_t number, int system_errno) STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    failing_calls_[number] = system_errno;
  }
  void fail_all_after(std::uint64_t number, int system_errno) STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    fail_after_number_ = number;
    fail_after_errno_ = system_errno;
  }
  void fail_operation(std::string_view operation, std::uint64_t nth, int system_errno)
      STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    failing_operations_.push_back({std::string(operation), nth, system_errno});
  }
  void fail_durability(int system_errno) STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    durability_errno_ = system_errno;
  }
  void clear_faults() STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    failing_calls_.clear();
    failing_operations_.clear();
    fail_after_number_ = std::numeric_limits<std::uint64_t>::max();
    durability_errno_.reset();
  }
  void set_hook(std::function<void(const Call&)> hook) STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    hook_ = std::move(hook);
  }
  [[nodiscard]] std::optional<int> durability_errno() STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    return durability_errno_;
  }
  [[nodiscard]] std::vector<Call> log() STRANDLINE_EXCLUDES(mutex_) {
    base::MutexLock lock(mutex_);
    return log_;
  }

 private:
  struct FailingOperation {
    std::string operation;
    std::uint64_t calls_left;
    int system_errno;
  };

  std::optional<int> fault_of(const Call& call) STRANDLINE_REQUIRES(mutex_) {
    std::optional<int> fault;
    for (FailingOperation& failing : failing_operations_) {
      if (failing.operation != call.operation || failing.calls_left == 0) continue;
      if (--failing.calls_left == 0) fault = failing.system_errno;
    }
    const auto failing = failing_calls_.find(call.number);
    if (failing != failing_calls_.end()) return failing->second;
    if (call.number > fail_after_number_) return fail_after_errno_;
    return fault;
  }

  base::Mutex mutex_;
  std::vector<Call> log_ STRANDLINE_GUARDED_BY(mutex_);
  std::map<std::uint64_t, int> failing_calls_ STRANDLINE_GUARDED_BY(mutex_);
  std::vector<FailingOperation> failing_operations_ STRANDLINE_GUARDED_BY(mutex_);
  std::uint64_t fail_after_number_ STRANDLINE_GUARDED_BY(mutex_) =
      std::numeric_limits<std::uint64_t>::max();
  int fail_after_errno_ STRANDLINE_GUARDED_BY(mutex_) = 0;
  std::optional<int> durability_errno_ STRANDLINE_GUARDED_BY(mutex_);
  std::function<void(const Call&)> hook_ STRANDLINE_GUARDED_BY(mutex_);
};

namespace {

std::string joined(std::string_view directory, std::string_view name) {
  return std::string(directory) + '/' + std::string(name);
}

class FaultyFile final : public WritableFile {
 public:
  FaultyFile(std::unique_ptr<WritableFile> wrapped, std::shared_ptr<FaultPlan> plan,
             std::string name)
      : wrapped_(std::move(wrapped)), plan_(std::move(plan)), name_(std::move(name)) {}

  void write_at(std::uint64_t offset, std::span<const std::byte> bytes, Completion done) override {
    Status admitted = plan_->admit("write_at", name_);
    if (!admitted) {
      done(std::move(admitted));
      return;
    }
    wrapped_->write_at(offset, bytes, std::move(done));
  }

  Status sync() override {
    STRANDLINE_RETURN_IF_ERROR(plan_->admit("sync", name_));
    return wrapped_->sync();
  }

 private:
  const std::unique_ptr<WritableFile> wrapped_;
  const std::shared_ptr<FaultPlan> plan_;
  const std::string name_;
};

class FaultyPartialDirectory final : public PartialDirectory {
 public:
  FaultyPartialDirectory(std::unique_ptr<PartialDirectory> wrapped, std::shared_ptr<FaultPlan> plan,
                         std::string name)
      : wrapped_(std::move(wrapped)), plan_(std::move(plan)), name_(std::move(name)) {}

  Result<std::unique_ptr<WritableFile>> create(std::string_view name,
                                               std::uint64_t bytes) override {
    const std::string full = joined(name_, name);
    STRANDLINE_RETURN_IF_ERROR(plan_->admit("create", full));
    STRANDLINE_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file, wrapped_->create(name, bytes));
    return std::make_unique<FaultyFile>(std::move(file), plan_, full);
  }

  Result<std::vector<std::string>> list() override {
    STRANDLINE_RETURN_IF_ERROR(plan_->admit("list_partial", name_));
    return wrapped_->list();
  }

  std::unique_ptr<PartialDirectory> unwrap() { return std::move(wrapped_); }

 private:
  std::unique_ptr<PartialDirectory> wrapped_;
  const std::shared_ptr<FaultPlan> plan_;
  const std::string name_;
};

class FaultyReadableDirectory final : public ReadableDirectory {
 public:
  FaultyReadableDirectory(std::shared_ptr<ReadableDirectory> wrapped,
                          std::shared_ptr<FaultPlan> plan, std::string name)
      : wrapped_(std::move(wrapped)), plan_(std::move(plan)), name_(std::move(name)) {}

  Result<std::vector<std::string>> list() override {
    STRANDLINE_RETURN_IF_ERROR(plan_->admit("list_step", name_));
    return wrapped_->list();
  }
  Result<std::uint64_t> file_bytes(std::string_view name) override {
    STRANDLINE_RETURN_IF_ERROR(plan_->admit("file_bytes", joined(name_, name)));
    return wrapped_->file_bytes(name);
  }
  Status read_at(std::string_view name, std::uint64_t offset, std::span<std::byte> bytes) override {
    STRANDLINE_RETURN_IF_ERROR(plan_->admit("read_at", joined(name_, name)));
    return wrapped_->read_at(name, offset, bytes);
  }
  std::string path() const override { return wrapped_->path(); }

 private:
  const std::shared_ptr<ReadableDirectory> wrapped_;
  const std::shared_ptr<FaultPlan> plan_;
  const std::string name_;
};

}  // namespace

FaultInjectingStorage::FaultInjectingStorage(std::shared_ptr<Storage> wrapped)
    : wrapped_(std::move(wrapped)), plan_(std::make_shared<FaultPlan>()) {}
FaultInjectingStorage::~FaultInjectingStorage() = default;

void FaultInjectingStorage::fail_call(std::uint64_t number, int system_errno) {
  plan_->fail_call(number, system_errno);
}
void FaultInjectingStorage::fail_all_after(std::uint64_t number, int system_errno) {
  plan_->fail_all_after(number, system_errno);
}
void FaultInjectingStorage::fail_operation(std::string_view operation, std::uint64_t nth,
                                           int system_errno) {
  plan_->fail_operation(operation, nth, system_errno);
}
void FaultInjectingStorage::fail_durability(int system_errno) {
  plan_->fail_durability(system_errno);
}
void FaultInjectingStorage::clear_faults() { plan_->clear_faults(); }
void FaultInjectingStorage::before_each_call(std::function<void(const Call&)> hook) {
  plan_->set_hook(std::move(hook));
}
std::uint64_t FaultInjectingStorage::calls() const { return plan_->log().size(); }
std::vector<FaultInjectingStorage::Call> FaultInjectingStorage::log() const { return plan_->log(); }

Result<std::unique_ptr<PartialDirectory>> FaultInjectingStorage::begin(std::string_view name) {
  STRANDLINE_RETURN_IF_ERROR(plan_->admit("begin", std::string(name)));
  STRANDLINE_ASSIGN_OR_RETURN(std::unique_ptr<PartialDirectory> partial, wrapped_->begin(name));
  return std::make_unique<FaultyPartialDirectory>(std::move(partial), plan_, std::string(name));
}

Result<Publication> FaultInjectingStorage::publish(std::unique_ptr<PartialDirectory> partial,
                                                   std::string_view name, Publish mode) {
  STRANDLINE_RETURN_IF_ERROR(plan_->admit("publish", std::string(name)));
  auto* const own = dynamic_cast<FaultyPartialDirectory*>(partial.get());
  STRANDLINE_ASSIGN_OR_RETURN(
      Publication publication,
      wrapped_->publish(own != nullptr ? own->unwrap() : std::move(partial), name, mode));
  if (const std::optional<int> system_errno = plan_->durability_errno()) {
    publication.durable = failure(base::system_error("sync", path(), *system_errno));
  }
  return publication;
}

Result<std::vector<std::string>> FaultInjectingStorage::list() {
  STRANDLINE_RETURN_IF_ERROR(plan_->admit("list", ""));
  return wrapped_->list();
}

Result<std::shared_ptr<ReadableDirectory>> FaultInjectingStorage::open(std::string_view name) {
  STRANDLINE_RETURN_IF_ERROR(plan_->admit("open", std::string(name)));
  STRANDLINE_ASSIGN_OR_RETURN(std::shared_ptr<ReadableDirectory> step, wrapped_->open(name));
  return std::make_shared<FaultyReadableDirectory>(std::move(step), plan_, std::string(name));
}

Status FaultInjectingStorage::remove(std::string_view name) {
  STRANDLINE_RETURN_IF_ERROR(plan_->admit("remove", std::string(name)));
  return wrapped_->remove(name);
}

Status FaultInjectingStorage::remove_if_abandoned(std::string_view name) {
  STRANDLINE_RETURN_IF_ERROR(plan_->admit("remove_if_abandoned", std::string(name)));
  return wrapped_->remove_if_abandoned(name);
}

Result<std::unique_ptr<WriterLock>> FaultInjectingStorage::lock(std::string_view opened_at) {
  STRANDLINE_RETURN_IF_ERROR(plan_->admit("lock", std::string(opened_at)));
  return wrapped_->lock(opened_at);
}

std::string FaultInjectingStorage::path() const { return wrapped_->path(); }

}  // namespace strandline::testing
