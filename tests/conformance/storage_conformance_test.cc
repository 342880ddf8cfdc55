// Every storage of the library, and every way the POSIX one has to publish, against the one suite.

#include "storage_conformance.h"

#include <stdio.h>

#include <cerrno>

#include "storage/posix_storage.h"
#include "testing/fault_injecting_storage.h"

namespace strandline::testing {
namespace {

using storage::PosixStorage;
using storage::PublishCalls;

struct PosixFactory {
  static std::shared_ptr<Storage> open(const std::filesystem::path& root) {
    return open_posix_storage(root).value();
  }
};

// A file system that refuses one kind of rename, or every kind but the plain one.
template <unsigned kRefusedFlags>
struct RefusingFactory {
  static std::shared_ptr<Storage> open(const std::filesystem::path& root) {
    PublishCalls calls;
    calls.rename = [plain = calls.rename](int directory, const char* from, const char* to,
                                          unsigned flags) {
      if ((flags & kRefusedFlags) == 0) return plain(directory, from, to, flags);
      errno = EINVAL;
      return -1;
    };
    return PosixStorage::open_root(root, calls).value();
  }
};
using WithoutExchangeFactory = RefusingFactory<RENAME_EXCHANGE>;
using WithPlainRenameOnlyFactory = RefusingFactory<RENAME_EXCHANGE | RENAME_NOREPLACE>;

struct FaultlessFactory {
  static std::shared_ptr<Storage> open(const std::filesystem::path& root) {
    return std::make_shared<FaultInjectingStorage>(open_posix_storage(root).value());
  }
};

INSTANTIATE_TYPED_TEST_SUITE_P(Posix, StorageConformance, PosixFactory, );
INSTANTIATE_TYPED_TEST_SUITE_P(PosixWithoutExchange, StorageConformance, WithoutExchangeFactory, );
INSTANTIATE_TYPED_TEST_SUITE_P(PosixWithPlainRenameOnly, StorageConformance,
                               WithPlainRenameOnlyFactory, );
INSTANTIATE_TYPED_TEST_SUITE_P(FaultInjectingWithoutFaults, StorageConformance, FaultlessFactory, );

}  // namespace
}  // namespace strandline::testing
