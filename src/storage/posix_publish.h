// The commit point on a POSIX file system.
#pragma once

#include <cstdint>
#include <string>

#include "storage/posix_directory.h"
#include "strandline/storage.h"

namespace strandline::storage {

// What a file system can be assumed to do; tests narrow it to reach the other ways.
struct FileSystemAbilities {
  bool exchange = true;           // RENAME_EXCHANGE
  bool rename_new = true;         // RENAME_NOREPLACE
  int root_sync_errno = 0;        // If not 0, syncing the root after a rename fails with this.
  int rename_to_final_errno = 0;  // If not 0, the rename to the final name fails with this.
};

// Makes `partial` visible as `final_name`; see Storage::publish() and the essay in the .cc.
[[nodiscard]] Result<Publication> publish_directory(PosixPartialDirectory& partial,
                                                    const std::string& final_name, Publish mode,
                                                    const FileSystemAbilities& abilities);

}  // namespace strandline::storage
