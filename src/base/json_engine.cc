#include "base/json_engine.h"

#include <simdjson.h>

namespace strandline::base {

void choose_json_engine() {
  static const bool kChosen = [] {
    simdjson::get_active_implementation() =
        simdjson::get_available_implementations().detect_best_supported();
    return true;
  }();
  static_cast<void>(kChosen);
}

}  // namespace strandline::base
