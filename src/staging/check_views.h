// What every layout asks of a state before it is laid out.
#pragma once

#include <string_view>

#include "strandline/error.h"
#include "strandline/state_dict.h"

namespace strandline::staging {

// Whether there is a view for every tensor of the structure, each what the structure says and
// inside its storage. Fails with what TensorView::check() does, or kInvalidArgument, with the key
// path of the first tensor in question: "cannot <verb> '<key path>': …". Pure.
[[nodiscard]] Status check_views(const StateDict& state, std::string_view verb);

}  // namespace strandline::staging
