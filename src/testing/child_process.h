// A forked child that runs a piece of a test: with other rights, another view of the file system,
// or to be killed.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <functional>
#include <stdexcept>
#include <string>

#include "base/unique_fd.h"

namespace strandline::testing {

// Two ends of a pipe, with which processes wait for each other.
struct Pipe {
  base::UniqueFd out;
  base::UniqueFd in;

  Pipe() {
    std::array<int, 2> ends{};
    if (::pipe(ends.data()) != 0) throw std::runtime_error("cannot create a pipe");
    out = base::UniqueFd(ends[0]);
    in = base::UniqueFd(ends[1]);
  }

  void send() const { static_cast<void>(!::write(in.get(), "x", 1)); }

  // Waits for one send(). False if all writing ends are closed instead.
  [[nodiscard]] bool receive() const {
    char byte = 0;
    ssize_t got = ::read(out.get(), &byte, 1);
    while (got < 0 && errno == EINTR) got = ::read(out.get(), &byte, 1);
    return got == 1;
  }
};

// Runs `body` in a forked child. Destroying it kills the child if it still runs.
class ChildProcess {
 public:
  explicit ChildProcess(const std::function<std::string()>& body) {
    pid_ = ::fork();
    if (pid_ < 0) throw std::runtime_error("cannot fork");
    if (pid_ != 0) {
      result_.in.reset();
      return;
    }
    result_.out.reset();
    const std::string text = body();
    const bool sent =
        ::write(result_.in.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size());
    ::_exit(sent ? 0 : 1);  // Nothing of the test program's end runs in the child.
  }
  ~ChildProcess() {
    if (pid_ > 0) {
      kill();
      static_cast<void>(wait());
    }
  }
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  void kill() const { ::kill(pid_, SIGKILL); }

  // Waits for the end. What `body` returned (less than a pipe holds, 64 KiB), or how the child
  // died. Children of the child may live on.
  [[nodiscard]] std::string wait() {
    int status = 0;
    while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    if (WIFSIGNALED(status)) return "killed by signal " + std::to_string(WTERMSIG(status));
    if (WEXITSTATUS(status) != 0) return "exited with " + std::to_string(WEXITSTATUS(status));
    // Does not wait for the pipe's end, which a child of the child may hold open.
    std::string text(std::size_t{1} << 16, '\0');
    ::fcntl(result_.out.get(), F_SETFL, O_NONBLOCK);
    const ssize_t got = ::read(result_.out.get(), text.data(), text.size());
    text.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
    return text;
  }

 private:
  Pipe result_;
  pid_t pid_ = -1;
};

}  // namespace strandline::testing
