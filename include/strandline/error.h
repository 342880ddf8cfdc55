/// @file
/// The one error channel of the library: every call that can fail returns a Result.
///
/// The library never throws by itself, prints, or exits. The Python package turns each code into
/// one exception class.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

#include "strandline/export.h"

namespace strandline::inline v0 {

/// What kind of thing went wrong; each code says what the caller should do.
enum class ErrorCode : std::uint8_t {
  kInvalidArgument,  ///< An argument or option is wrong: correct the call.
  kUnsupported,      ///< A value of the state cannot be saved or read: convert or remove it.
  kNotFound,         ///< No such checkpoint, file or key: check the path or the name.
  kAlreadyExists,    ///< The step or path is taken: choose another one or pass `overwrite`.
  kMismatch,         ///< The checkpoint and the destination differ in names, shapes or dtypes.
  kCorrupt,          ///< The checkpoint is damaged: use an older one; the bytes are never loaded.
  kIo,               ///< The file system refused: see `system_errno`, free space or rights.
  kMemoryLimit,      ///< The host memory ceiling does not allow it: raise it or save less.
  kTimeout,          ///< A wait reached its deadline: wait again or raise the deadline.
  kUnavailable,      ///< Closed, cancelled, forked, or another writer holds the directory.
};

/// The stable name of a code, such as "already exists".
STRANDLINE_EXPORT std::string_view error_code_name(ErrorCode code);

/// What was being done, to what, what went wrong, and what to do.
struct Error {
  ErrorCode code = ErrorCode::kInvalidArgument;
  std::string message = {};  ///< One or two sentences, remedy included.
  std::string key_path =
      {};  ///< The tensor or value concerned, such as "model.layer.weight"; or empty.
  std::string path = {};                    ///< The file or directory concerned; or empty.
  int system_errno = 0;                     ///< The operating system's error number; 0 if none.
  std::shared_ptr<const Error> cause = {};  ///< What led to this error; null if nothing did.

  /// The whole error as text: message, then key path, path and errno where they are not in the
  /// message already, then each cause after "caused by".
  [[nodiscard]] STRANDLINE_EXPORT std::string text() const;
};

/// A value, or the Error that prevented it. Test it like a pointer, read it with `*` and `->`.
template <typename T>
class [[nodiscard]] Result : public tl::expected<T, Error> {
 public:
  using tl::expected<T, Error>::expected;
};

/// A Result without a value: success, or an Error.
using Status = Result<void>;

/// Makes the failing side of any Result: `return failure(ErrorCode::kIo, "…")`.
[[nodiscard]] inline tl::unexpected<Error> failure(Error error) {
  return tl::unexpected<Error>(std::move(error));
}
[[nodiscard]] inline tl::unexpected<Error> failure(ErrorCode code, std::string message) {
  return failure(Error{.code = code, .message = std::move(message)});
}

}  // namespace strandline::inline v0
