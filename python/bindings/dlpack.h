/// @file
/// The part of DLPack's exchange API that is used: filling a DLTensor from a tensor object by a C
/// function, without Python calls. The layouts are those of DLPack 1.x (dlpack.h of the standard).
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>

#include "strandline/dtype.h"

namespace strandline::python {

struct DLDevice {
  std::int32_t type;
  std::int32_t index;
};
inline constexpr std::int32_t kDLCpu = 1;

struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t dimensions;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // In elements.
  std::uint64_t byte_offset;
};

/// Fills a DLTensor that borrows from the object; 0, or -1 with an exception set.
using DLTensorFromObject = int (*)(void* object, DLTensor* out);

/// The function of a tensor type, from its `__dlpack_c_exchange_api__`; null where it has none, or
/// one of another major version.
DLTensorFromObject dltensor_function(PyTypeObject* type);

/// The element type; nothing if it has no counterpart.
std::optional<DType> dtype_of(DLDataType type);

}  // namespace strandline::python
