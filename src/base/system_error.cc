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
    default:
      return "";
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
