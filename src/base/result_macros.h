// The two error macros: propagate a failure, or unwrap a value.
#pragma once

#include "strandline/error.h"

#define STRANDLINE_CONCAT_INNER(a, b) a##b
#define STRANDLINE_CONCAT(a, b) STRANDLINE_CONCAT_INNER(a, b)

// Returns the error of `expression` (a Status or Result) from the enclosing function, if it failed.
#define STRANDLINE_RETURN_IF_ERROR(expression)                               \
  do {                                                                       \
    if (auto status_of_expression = (expression); !status_of_expression) {   \
      return ::strandline::failure(std::move(status_of_expression).error()); \
    }                                                                        \
  } while (false)

// Defines or assigns `target` from the value of `expression`, or returns its error.
#define STRANDLINE_ASSIGN_OR_RETURN(target, expression) \
  STRANDLINE_ASSIGN_OR_RETURN_INNER(STRANDLINE_CONCAT(result_, __LINE__), target, expression)
#define STRANDLINE_ASSIGN_OR_RETURN_INNER(result, target, expression)   \
  auto result = (expression);                                           \
  if (!result) return ::strandline::failure(std::move(result).error()); \
  target = std::move(*result)
