// Checks what callers give to save(), before anything happens. Pure.
#pragma once

#include <cstdint>

#include "strandline/checkpointer.h"
#include "strandline/error.h"
#include "strandline/state_dict.h"

namespace strandline::checkpoint {

[[nodiscard]] Status check_options(const CheckpointerOptions& options);

// Step, construction of the state, text that JSON can hold, metadata without tensors, names of
// extra files.
[[nodiscard]] Status check_arguments(std::int64_t step, const StateDict& state,
                                     const SaveOptions& options);

// The state's tree and plain values, for the background: views lose memory and keep-alives, so that
// what is saved behind the caller's back cannot touch it.
[[nodiscard]] StateDict without_memory(const StateDict& state);

}  // namespace strandline::checkpoint
