// Text for people: tables, sizes, times, and strings from files made safe for a terminal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace strandline::cli {

// `text` with everything escaped that a terminal might act upon or show as nothing: control
// characters (C1 included), invalid UTF-8, and characters that reorder or hide text. Key paths, run
// names and metadata come from files and may hold anything.
[[nodiscard]] std::string printable(std::string_view text);

// `text` cut to `characters_max`, with "..." in the place of what was cut. Cuts no character of
// UTF-8 in two.
[[nodiscard]] std::string shortened(std::string_view text, std::size_t characters_max);

// "24 B", "1.5 GiB".
[[nodiscard]] std::string human_bytes(std::uint64_t bytes);

// "1 file", "2 files".
[[nodiscard]] std::string counted(std::uint64_t count, std::string_view noun);

// "2026-03-01 17:04:59", in the time zone of the process; and "2026-03-01T16:04:59Z".
[[nodiscard]] std::string local_time(std::int64_t unix_ns);
[[nodiscard]] std::string utc_time(std::int64_t unix_ns);

// A table whose columns are as wide as their widest cell. Cells are made printable.
class Table {
 public:
  struct Column {
    std::string title;
    bool align_right = false;
  };
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  // REQUIRES: one cell per column.
  void add_row(const std::vector<std::string>& cells);

  // The titles (unless all are empty) and the rows, each with `indent` spaces before it.
  [[nodiscard]] std::string text(std::size_t indent = 0) const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace strandline::cli
