#include "output.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <string>

#include "text.h"

namespace strandline::cli {

void Output::write(std::string_view text) {
  while (!text.empty() && !closed_ && error_ == 0) {
    const ssize_t written = ::write(STDOUT_FILENO, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<std::size_t>(written));
    } else if (errno == EPIPE) {
      closed_ = true;
    } else if (errno != EINTR) {
      error_ = errno;
    }
  }
}

void complain(std::string_view text) {
  std::fputs(("strandline: " + printable(text) + "\n").c_str(), stderr);
}

}  // namespace strandline::cli
