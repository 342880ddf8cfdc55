// Runs a program from outside, the way a shell does, and collects what it says.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <string>
#include <vector>

namespace strandline::testing {

struct ProcessResult {
  int exit_code = -1;  // -1 if a signal ended it.
  int signal = 0;
  std::string out;
  std::string err;
};

struct ProcessOptions {
  int stdout_fd = -1;              // Takes the place of the pipe that fills `out`.
  int stderr_fd = -1;              // Takes the place of the pipe that fills `err`.
  bool interrupt_pending = false;  // Ctrl-C was pressed before the program's first instruction.
};

// Reads both pipes until they are closed, whichever of them speaks first.
inline void drain(std::array<int, 2> fds, std::array<std::string*, 2> texts) {
  std::array<pollfd, 2> waits{{{fds[0], POLLIN, 0}, {fds[1], POLLIN, 0}}};
  while (waits[0].fd >= 0 || waits[1].fd >= 0) {
    if (poll(waits.data(), waits.size(), -1) < 0 && errno != EINTR) return;
    for (std::size_t i = 0; i < waits.size(); ++i) {
      if (waits[i].fd < 0 || waits[i].revents == 0) continue;
      std::array<char, 4096> buffer;
      const ssize_t count = read(waits[i].fd, buffer.data(), buffer.size());
      if (count > 0) {
        texts[i]->append(buffer.data(), static_cast<std::size_t>(count));
      } else {
        waits[i].fd = -1;
      }
    }
  }
}

// Replaces the calling child by the program; never returns. Allocates nothing: other threads of the
// parent may have held the allocator's lock when it forked.
[[noreturn]] inline void become(char* const* arguments, int out, int err, bool interrupt_pending) {
  dup2(out, STDOUT_FILENO);
  dup2(err, STDERR_FILENO);
  // A shell starts programs with the default; whoever runs the tests may not have.
  signal(SIGINT, SIG_DFL);
  signal(SIGPIPE, SIG_DFL);
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  sigprocmask(interrupt_pending ? SIG_BLOCK : SIG_UNBLOCK, &interrupt, nullptr);
  if (interrupt_pending) raise(SIGINT);  // Blocked: it stays pending through exec.
  execv(arguments[0], arguments);
  _exit(127);
}

// Runs `command`, whose first word is the program's path.
inline ProcessResult run_process(const std::vector<std::string>& command,
                                 const ProcessOptions& options = {}) {
  std::array<int, 2> out{-1, -1};
  std::array<int, 2> err{-1, -1};
  ProcessResult result;
  if (pipe2(out.data(), O_CLOEXEC) != 0 || pipe2(err.data(), O_CLOEXEC) != 0) return result;
  std::vector<char*> arguments;
  for (const std::string& argument : command) {
    arguments.push_back(const_cast<char*>(argument.c_str()));
  }
  arguments.push_back(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    become(arguments.data(), options.stdout_fd >= 0 ? options.stdout_fd : out[1],
           options.stderr_fd >= 0 ? options.stderr_fd : err[1], options.interrupt_pending);
  }
  close(out[1]);
  close(err[1]);
  drain({out[0], err[0]}, {&result.out, &result.err});
  close(out[0]);
  close(err[0]);
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) return result;
  if (WIFEXITED(status)) result.exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) result.signal = WTERMSIG(status);
  return result;
}

}  // namespace strandline::testing
