#include "base/system_error.h"

#include <cerrno>
#include <system_error>

namespace strandline::base {
namespace {

std::string_view remedy(int error) {
  switch (error) {
    case EACCES:
    case EPERM:
      return "; check owner and rights of the directory";
    case EROFS:
      return "; the file system is mounted read-only";
    case ENOSPC:
      return "; free space there, keep fewer checkpoints, or choose another directory";
    case EDQUOT:
      return "; the quota is used up: free space or ask for more";
    case EMFILE:
    case ENFILE:
      return "; too many files are open: raise `ulimit -n`";
    case ENAMETOOLONG:
      return "; choose a shorter path";
    case ELOOP:
      return "; a symbolic link is in the way";
    case EIO:
      return "; the device reported an error: check it before you trust it";
    case ENOENT:
      return "; check the path, and that its disk is mounted";
    case ENOTDIR:
      return "; a file stands where a directory is needed: move it away, or choose another path";
    case EISDIR:
      return "; a directory stands where a file is needed: move it away, or choose another path";
    case EBUSY:
    case ETXTBSY:
      return "; something else is using it: try again when that has ended";
    case ESTALE:
    case ENOTCONN:
    case ETIMEDOUT:
      return "; the server of the file system has lost it or does not answer: mount it again";
    case ENOMEM:
      return "; free memory";
    case EEXIST:
      return "";  // Whoever asked knows what may stand there.
    default:
      return "; check the file system that it is on";
  }
}

ErrorCode code_of(int error) {
  switch (error) {
    case ENOENT:
      return ErrorCode::kNotFound;
    case EEXIST:
      return ErrorCode::kAlreadyExists;
    default:
      return ErrorCode::kIo;
  }
}

}  // namespace

Error system_error(std::string_view operation, std::string_view path, int error) {
  std::string message = "cannot ";
  message += operation;
  message += " '";
  message += path;
  message += "': ";
  message += std::generic_category().message(error);
  message += remedy(error);
  return Error{.code = code_of(error),
               .message = std::move(message),
               .path = std::string(path),
               .system_errno = error};
}

}  // namespace strandline::base
