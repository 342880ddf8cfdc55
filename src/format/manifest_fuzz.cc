// Feeds arbitrary bytes to the parser of manifests: as they are, and with the tail that their
// digest needs, so that what lies behind the digest is reached.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "format/digest.h"
#include "format/manifest.h"

namespace {

using strandline::format::parse_manifest;
using strandline::format::write_manifest;

// What was taken must be written again, and from then on stay the same text.
void check_round_trip(const strandline::format::Manifest& manifest) {
  const auto text = write_manifest(manifest);
  if (!text) std::abort();
  const auto again = parse_manifest(*text);
  if (!again) std::abort();
  const auto text_again = write_manifest(*again);
  if (!text_again || *text_again != *text) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view body(reinterpret_cast<const char*>(data), size);
  (void)parse_manifest(body);
  const std::string sealed = std::string(body) + R"(,"manifest_digest":")" +
                             strandline::format::digest_of(body).hex() + "\"}\n";
  const auto manifest = parse_manifest(sealed);
  if (manifest) check_round_trip(*manifest);
  return 0;
}
