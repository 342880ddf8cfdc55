// A storage that fails when the test says so.
//
// Fault model. Every call is counted, from 1, in the order in which calls are made: on the storage
// and on everything it hands out. A call that is chosen to fail is *not forwarded*: nothing of it
// has happened below, as when the system refuses it. Its error is an ordinary one, with the code
// that the errno has in production. What is destroyed is not a call: a partial directory whose
// publish() failed is removed as in production, and a lock is released.
//
// Not modelled: calls that fail after having had their effect (but for publish(), see
// fail_durability()), short writes (the POSIX storage continues them; its own tests cover that),
// and the loss of data that were not synced.
//
// Operations, as they appear in the log, with the name they carry:
//   storage     begin(partial name) publish(final name) list() open(step) remove(name)
//               remove_if_abandoned(name) lock(opened_at)
//   partial     create(partial name/file) list_partial(partial name)
//   file        write_at(partial name/file) sync(partial name/file)
//   step        list_step(step) file_bytes(step/file) read_at(step/file)
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "strandline/storage.h"

namespace strandline::testing {

class FaultPlan;

// Thread-safety: thread-safe; with several threads the numbers of concurrent calls are arbitrary.
// Ownership: shares the wrapped storage; what it hands out may outlive it.
class FaultInjectingStorage final : public Storage {
 public:
  struct Call {
    std::uint64_t number = 0;  // From 1.
    std::string operation;
    std::string name;
    bool failed = false;  // By injection, not by the storage below.
  };

  explicit FaultInjectingStorage(std::shared_ptr<Storage> wrapped);
  ~FaultInjectingStorage() override;

  // The call with this number fails with this errno.
  void fail_call(std::uint64_t number, int system_errno);
  // All calls with higher numbers fail: the storage is gone.
  void fail_all_after(std::uint64_t number, int system_errno);
  // From now on, the `nth` (from 1) call of an operation fails, once.
  void fail_operation(std::string_view operation, std::uint64_t nth, int system_errno);
  // From now on every publish() succeeds, but reports that the step is not durable.
  void fail_durability(int system_errno);
  // Takes back all of the above. Numbers go on.
  void clear_faults();

  // Runs before each call is counted as failed or forwarded, on the calling thread and without any
  // lock held, so that it may cancel, wait, kill the process, or plan faults. Replaces the one
  // before; empty takes it back.
  void before_each_call(std::function<void(const Call&)> hook);

  [[nodiscard]] std::uint64_t calls() const;
  [[nodiscard]] std::vector<Call> log() const;

  [[nodiscard]] Result<std::unique_ptr<PartialDirectory>> begin(std::string_view name) override;
  [[nodiscard]] Result<Publication> publish(std::unique_ptr<PartialDirectory> partial,
                                            std::string_view name, Publish mode) override;
  [[nodiscard]] Result<std::vector<std::string>> list() override;
  [[nodiscard]] Result<std::shared_ptr<ReadableDirectory>> open(std::string_view name) override;
  [[nodiscard]] Status remove(std::string_view name) override;
  [[nodiscard]] Status remove_if_abandoned(std::string_view name) override;
  [[nodiscard]] Result<std::unique_ptr<WriterLock>> lock(std::string_view opened_at) override;
  [[nodiscard]] std::string path() const override;  // Not counted: it touches no storage.

 private:
  const std::shared_ptr<Storage> wrapped_;
  const std::shared_ptr<FaultPlan> plan_;
};

}  // namespace strandline::testing
