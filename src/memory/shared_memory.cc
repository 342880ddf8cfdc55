#include "strandline/shared_memory.h"

#include "base/no_throw.h"
#include "memory/exchange.h"

namespace strandline::inline v0 {

Result<SharedRange> share(const std::byte* data, std::uint64_t bytes) {
  return base::no_throw("sharing staged memory",
                        [&] { return memory::exchange().share(data, bytes); });
}

Result<AttachedMemory> attach(const SharedRange& range) {
  return base::no_throw("attaching shared memory",
                        [&] { return memory::exchange().attach(range); });
}

}  // namespace strandline::inline v0
