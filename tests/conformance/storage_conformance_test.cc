// Every storage of the library, and every way the POSIX one has to publish, against the one suite.

#include "storage_conformance.h"

#include "storage/posix_storage.h"
#include "testing/fault_injecting_storage.h"

namespace strandline::testing {
namespace {

using storage::FileSystemAbilities;
using storage::PosixStorage;

struct PosixFactory {
  static std::shared_ptr<Storage> open(const std::filesystem::path& root) {
    return open_posix_storage(root).value();
  }
};

struct WithoutExchangeFactory {
  static std::shared_ptr<Storage> open(const std::filesystem::path& root) {
    return PosixStorage::open_root(root, FileSystemAbilities{.exchange = false}).value();
  }
};

struct WithPlainRenameOnlyFactory {
  static std::shared_ptr<Storage> open(const std::filesystem::path& root) {
    return PosixStorage::open_root(root,
                                   FileSystemAbilities{.exchange = false, .rename_new = false})
        .value();
  }
};

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
