#include "format/version.h"

#include <fmt/format.h>

#include <iterator>
#include <limits>

namespace strandline::format {

void append_format(std::string& out) {
  fmt::format_to(std::back_inserter(out), R"("format":{{"major":{},"minor":{},"requires":[]}})",
                 kFormatMajor, kFormatMinor);
}

Result<FormatVersion> read_format(const JsonObject& root) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode node, root.member("format"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode major, members.member("major"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode minor, members.member("minor"));
  STRANDLINE_ASSIGN_OR_RETURN(const JsonNode needed, members.member("requires"));
  FormatVersion version;
  STRANDLINE_ASSIGN_OR_RETURN(version.major, read_uint32(major));
  STRANDLINE_ASSIGN_OR_RETURN(version.minor, read_uint32(minor));
  if (version.major != kFormatMajor) {
    return failure(ErrorCode::kUnsupported,
                   fmt::format("{}: is version {}.{}; this Strandline reads version {}: read it "
                               "with the Strandline that wrote it, or a newer one",
                               node.place(), version.major, version.minor, kFormatMajor));
  }
  STRANDLINE_RETURN_IF_ERROR(needed.for_each_item([](const JsonNode& item, std::size_t) -> Status {
    STRANDLINE_ASSIGN_OR_RETURN(const std::string_view feature, item.text());
    return failure(ErrorCode::kUnsupported,
                   fmt::format("{}: the file needs '{}', which this Strandline does not know: "
                               "read it with a newer one",
                               item.place(), feature));
  }));
  return version;
}

Result<std::uint32_t> read_uint32(const JsonNode& node) {
  STRANDLINE_ASSIGN_OR_RETURN(const std::uint64_t number, node.unsigned_integer());
  if (number > std::numeric_limits<std::uint32_t>::max()) {
    return node.corrupt("does not fit into 32 bits");
  }
  return static_cast<std::uint32_t>(number);
}

}  // namespace strandline::format
