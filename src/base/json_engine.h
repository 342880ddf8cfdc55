// Which of simdjson's implementations is used.
#pragma once

namespace strandline::base {

// Chooses simdjson's implementation for this processor, the first time it is called. To be called
// before anything else of simdjson: left to itself, its first use reads an environment variable,
// and the library never reads the environment. Constant time afterwards. Thread-safety:
// thread-safe.
void choose_json_engine();

}  // namespace strandline::base
