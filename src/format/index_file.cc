#include "format/index_file.h"

#include "format/json_text.h"

namespace strandline::format {

std::string write_index_file(std::uint64_t data_bytes,
                             std::span<const std::pair<std::string, std::string>> weights) {
  std::string text = R"({"metadata":{"total_size":)";
  append_json_unsigned(text, data_bytes);
  text += R"(},"weight_map":{)";
  bool first = true;
  for (const auto& [name, file] : weights) {
    if (!first) text += ',';
    first = false;
    append_json_string(text, name);
    text += ':';
    append_json_string(text, file);
  }
  return text + "}}\n";
}

}  // namespace strandline::format
