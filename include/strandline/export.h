/// @file
/// Visibility of the library's symbols.
#pragma once

/// Marks what the shared library exports; everything else is hidden.
#if defined(STRANDLINE_SHARED)
#define STRANDLINE_EXPORT __attribute__((visibility("default")))
#else
#define STRANDLINE_EXPORT
#endif
