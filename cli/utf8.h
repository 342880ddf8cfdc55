// Reading UTF-8 character by character, as little as printing untrusted text needs.
#pragma once

#include <string_view>

namespace strandline::cli {

struct Utf8Character {
  std::string_view bytes;
  char32_t code = 0;
  bool valid = false;  // If not, `bytes` is one byte that belongs to no character.
};

// Takes the first character off `text`, which must not be empty.
inline Utf8Character take_character(std::string_view& text) {
  const auto first = static_cast<unsigned char>(text.front());
  std::size_t length = 1;
  char32_t code = first;
  char32_t code_min = 0;  // Below it the character has a shorter form, which alone is valid.
  if (first >= 0xf0 && first <= 0xf4) {
    length = 4, code = first & 0x07, code_min = 0x10000;
  } else if (first >= 0xe0 && first < 0xf0) {
    length = 3, code = first & 0x0f, code_min = 0x800;
  } else if (first >= 0xc2 && first < 0xe0) {
    length = 2, code = first & 0x1f, code_min = 0x80;
  }
  bool valid = (first < 0x80 || length > 1) && text.size() >= length;
  for (std::size_t i = 1; valid && i < length; ++i) {
    const auto next = static_cast<unsigned char>(text[i]);
    valid = (next & 0xc0) == 0x80;
    code = (code << 6) | (next & 0x3f);
  }
  const bool is_surrogate = code >= 0xd800 && code <= 0xdfff;
  valid = valid && code >= code_min && code <= 0x10ffff && !is_surrogate;
  const Utf8Character character{text.substr(0, valid ? length : 1), code, valid};
  text.remove_prefix(character.bytes.size());
  return character;
}

}  // namespace strandline::cli
