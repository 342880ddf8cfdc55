#include "text.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <ctime>
#include <utility>

#include "utf8.h"

namespace strandline::cli {
namespace {

// Characters beyond ASCII that are escaped: controls, and what reorders or hides text.
bool is_unsafe(char32_t c) {
  constexpr std::array<std::pair<char32_t, char32_t>, 9> kUnsafe{{
      {0x80, 0x9f},        // C1 controls: a terminal may take them for escape sequences.
      {0xad, 0xad},        // Soft hyphen.
      {0x61c, 0x61c},      // Arabic letter mark.
      {0x200b, 0x200f},    // Zero-width characters and direction marks.
      {0x2028, 0x202e},    // Separators, direction overrides.
      {0x2060, 0x206f},    // Invisible operators, direction isolates.
      {0xfeff, 0xfeff},    // Byte-order mark.
      {0xfff9, 0xfffb},    // Annotations.
      {0xe0000, 0xe0fff},  // Tags.
  }};
  return std::any_of(kUnsafe.begin(), kUnsafe.end(),
                     [c](const auto& range) { return range.first <= c && c <= range.second; });
}

std::string escaped_ascii(char c) {
  switch (c) {
    case '\n':
      return "\\n";
    case '\r':
      return "\\r";
    case '\t':
      return "\\t";
    default:
      break;
  }
  const auto byte = static_cast<unsigned char>(c);
  return byte < 0x20 || byte == 0x7f ? fmt::format("\\x{:02x}", byte) : std::string(1, c);
}

// The number of columns that printable text takes. Wide characters count as one: a table may then
// be ragged, never wrong.
std::size_t width_of(std::string_view text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

// Nanoseconds to whole seconds, rounded down also before 1970.
std::time_t seconds_of(std::int64_t unix_ns) {
  constexpr std::int64_t kPerSecond = 1'000'000'000;
  return static_cast<std::time_t>(unix_ns / kPerSecond - (unix_ns % kPerSecond < 0 ? 1 : 0));
}

std::string formatted_time(const std::tm& parts, const char* format) {
  char buffer[64];
  return {buffer, std::strftime(buffer, sizeof buffer, format, &parts)};
}

}  // namespace

std::string printable(std::string_view text) {
  std::string safe;
  safe.reserve(text.size());
  while (!text.empty()) {
    const Utf8Character character = take_character(text);
    if (!character.valid) {
      safe += fmt::format("\\x{:02x}", static_cast<unsigned char>(character.bytes.front()));
    } else if (character.code < 0x80) {
      safe += escaped_ascii(character.bytes.front());
    } else if (is_unsafe(character.code)) {
      safe += fmt::format("\\u{{{:x}}}", static_cast<std::uint32_t>(character.code));
    } else {
      safe += character.bytes;
    }
  }
  return safe;
}

std::string shortened(std::string_view text, std::size_t characters_max) {
  std::string_view rest = text;
  for (std::size_t i = 0; i < characters_max && !rest.empty(); ++i) take_character(rest);
  if (rest.empty()) return std::string(text);
  return std::string(text.substr(0, text.size() - rest.size())) + "...";
}

std::string human_bytes(std::uint64_t bytes) {
  constexpr std::array<const char*, 6> kUnits{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 1024) return fmt::format("{} B", bytes);
  double amount = static_cast<double>(bytes) / 1024;
  std::size_t unit = 0;
  // 1023.95 would be printed as 1024.0.
  for (; amount >= 1023.95 && unit + 1 < kUnits.size(); ++unit) amount /= 1024;
  return fmt::format("{:.1f} {}", amount, kUnits.at(unit));
}

std::string counted(std::uint64_t count, std::string_view noun) {
  return fmt::format("{} {}{}", count, noun, count == 1 ? "" : "s");
}

std::string local_time(std::int64_t unix_ns) {
  const std::time_t seconds = seconds_of(unix_ns);
  std::tm parts{};
  return localtime_r(&seconds, &parts) != nullptr ? formatted_time(parts, "%Y-%m-%d %H:%M:%S")
                                                  : std::to_string(unix_ns);
}

std::string utc_time(std::int64_t unix_ns) {
  const std::time_t seconds = seconds_of(unix_ns);
  std::tm parts{};
  return gmtime_r(&seconds, &parts) != nullptr ? formatted_time(parts, "%Y-%m-%dT%H:%M:%SZ")
                                               : std::to_string(unix_ns);
}

void Table::add_row(const std::vector<std::string>& cells) {
  std::vector<std::string>& row = rows_.emplace_back();
  row.reserve(cells.size());
  for (const std::string& cell : cells) row.push_back(printable(cell));
}

std::string Table::text(std::size_t indent) const {
  std::vector<std::string> titles;
  std::vector<std::size_t> widths;
  for (std::size_t i = 0; i < columns_.size(); ++i) {
    titles.push_back(columns_[i].title);
    std::size_t width = titles.back().size();
    for (const auto& row : rows_) width = std::max(width, width_of(row[i]));
    widths.push_back(width);
  }
  std::string text;
  const auto add_line = [&](const std::vector<std::string>& cells) {
    std::string line(indent, ' ');
    for (std::size_t i = 0; i < cells.size(); ++i) {
      const std::string padding(widths[i] - width_of(cells[i]), ' ');
      line += columns_[i].align_right ? padding + cells[i] : cells[i] + padding;
      line += "  ";
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + '\n';
  };
  const auto is_empty = [](const std::string& title) { return title.empty(); };
  if (!std::all_of(titles.begin(), titles.end(), is_empty)) add_line(titles);
  for (const auto& row : rows_) add_line(row);
  return text;
}

}  // namespace strandline::cli
