// A directory for one test, removed with all that is in it.
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>

namespace strandline::testing {

// Created empty under the system's directory for temporary files, with a new name each time.
// Removed by its destructor, though not in a forked child, where it is the parent's.
class TemporaryDirectory {
 public:
  TemporaryDirectory() : owner_(::getpid()) {
    std::string name = (std::filesystem::temp_directory_path() / "strandline-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) {
      throw std::runtime_error("cannot create a temporary directory like " + name);
    }
    path_ = name;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;  // A test that took away its own rights has to clean up itself.
    if (::getpid() == owner_) std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] std::filesystem::path operator/(const std::filesystem::path& name) const {
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
  pid_t owner_;
};

}  // namespace strandline::testing
