#include "memory/pages.h"

#include <sys/mman.h>

#include <cerrno>
#include <string>

#include "base/system_error.h"

namespace strandline::memory {
namespace {

class PrivatePages final : public Pages {
 public:
  explicit PrivatePages(bool inherited) : inherited_(inherited) {}

  Result<std::byte*> map(std::uint64_t bytes) override {
    void* mapped =
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return failure(cannot_map(bytes, errno));
    // Best effort: an old kernel without it only makes forks dearer.
    if (!inherited_) ::madvise(mapped, bytes, MADV_DONTFORK);
    return static_cast<std::byte*>(mapped);
  }
  Status back(std::byte*, std::uint64_t) override { return {}; }
  void unmap(std::byte* data, std::uint64_t bytes) override { ::munmap(data, bytes); }
  void open(std::byte*, std::uint64_t) override {}
  bool close(std::byte*) override { return true; }
  void cancel(std::byte*) override {}

 private:
  const bool inherited_;
};

}  // namespace

std::unique_ptr<Pages> make_private_pages(bool inherited) {
  return std::make_unique<PrivatePages>(inherited);
}

Error cannot_map(std::uint64_t bytes, int error) {
  Error refusal =
      base::system_error("map " + std::to_string(bytes) + " bytes of", "staging memory", error);
  refusal.code = ErrorCode::kMemoryLimit;
  refusal.path.clear();
  return refusal;
}

}  // namespace strandline::memory
