#include "strandline/error.h"

namespace strandline::inline v0 {

std::string_view error_code_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "invalid argument";
    case ErrorCode::kUnsupported:
      return "unsupported";
    case ErrorCode::kNotFound:
      return "not found";
    case ErrorCode::kAlreadyExists:
      return "already exists";
    case ErrorCode::kMismatch:
      return "mismatch";
    case ErrorCode::kCorrupt:
      return "corrupt";
    case ErrorCode::kIo:
      return "input/output";
    case ErrorCode::kMemoryLimit:
      return "memory limit";
    case ErrorCode::kTimeout:
      return "timeout";
    case ErrorCode::kUnavailable:
      return "unavailable";
  }
  return "unknown";
}

std::string Error::text() const {
  std::string text = message;
  if (!key_path.empty() && message.find(key_path) == std::string::npos) {
    text += " (key '" + key_path + "')";
  }
  if (!path.empty() && message.find(path) == std::string::npos) text += " (path '" + path + "')";
  if (cause) text += "; caused by: " + cause->text();
  return text;
}

}  // namespace strandline::inline v0
