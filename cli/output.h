// Where the tool writes: results to standard output, everything else to standard error.
#pragma once

#include <string_view>

namespace strandline::cli {

// Standard output. A reader that went away (`strandline ls … | head`) is no error: what follows is
// dropped, and the exit code stays what the verb found.
class Output {
 public:
  void write(std::string_view text);

  // Whether nobody reads any more, so that work for the output alone can stop.
  [[nodiscard]] bool closed() const { return closed_; }

  // The errno of the first write that failed for another reason; 0 if none did.
  [[nodiscard]] int error() const { return error_; }

 private:
  bool closed_ = false;
  int error_ = 0;
};

// One line on standard error, escaped and after the tool's name.
void complain(std::string_view text);

}  // namespace strandline::cli
