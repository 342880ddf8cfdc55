// The lock of the one writer of a storage.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "strandline/storage.h"

namespace strandline::storage {

// The lock's file in the root of a storage. It stays there for ever: see writer_lock.cc.
inline constexpr std::string_view kLockFileName = ".lock";

// Becomes the writer of the open directory `root`. `path` is its path.
[[nodiscard]] Result<std::unique_ptr<WriterLock>> acquire_writer_lock(int root,
                                                                      const std::string& path,
                                                                      std::string_view opened_at);

}  // namespace strandline::storage
