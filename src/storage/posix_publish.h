// The commit point on a POSIX file system.
#pragma once

#include <stdio.h>
#include <unistd.h>

#include <functional>
#include <string>

#include "storage/posix_directory.h"
#include "strandline/storage.h"

namespace strandline::storage {

// The two calls that publishing consists of. Tests put refusals, failures and witnesses in their
// place; both return -1 and set errno on failure.
struct PublishCalls {
  std::function<int(int fd)> sync = ::fsync;
  // Renames within one directory; `flags` as for renameat2(2), 0 for a plain rename.
  std::function<int(int directory, const char* from, const char* to, unsigned flags)> rename =
      [](int directory, const char* from, const char* to, unsigned flags) {
        return ::renameat2(directory, from, directory, to, flags);
      };
};

// Makes `partial` visible as `final_name`; see Storage::publish() and the essay in the .cc.
[[nodiscard]] Result<Publication> publish_directory(PosixPartialDirectory& partial,
                                                    const std::string& final_name, Publish mode,
                                                    const PublishCalls& calls);

}  // namespace strandline::storage
