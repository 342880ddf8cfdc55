// Where exceptions of the standard library become errors: at the top of every thread of the engine,
// and around calls into code that is not ours.
#pragma once

#include <exception>
#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "strandline/error.h"

namespace strandline::base {

// What `call` returns, a Result; or kMemoryLimit where memory ran out in it, and kUnavailable for
// any other exception. `doing` is such as "writing the checkpoint".
template <typename Call>
auto no_throw(std::string_view doing, Call&& call) -> decltype(std::forward<Call>(call)()) {
  try {
    return std::forward<Call>(call)();
  } catch (const std::bad_alloc&) {
    return failure(ErrorCode::kMemoryLimit, "out of memory while " + std::string(doing) +
                                                ": free host memory, or save less");
  } catch (const std::exception& error) {
    return failure(ErrorCode::kUnavailable,
                   "unexpected failure while " + std::string(doing) + ": " + error.what());
  }
}

}  // namespace strandline::base
