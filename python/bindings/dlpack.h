/// @file
/// The part of DLPack's exchange API that is used: filling a DLTensor from a tensor object by a C
/// function, without Python calls. The layouts are those of DLPack 1.x (dlpack.h of the standard).
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <memory>
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

/// A DLTensor with its owner; what a capsule named "dltensor" holds.
struct DLManagedTensor {
  DLTensor tensor;
  void* owner;
  void (*deleter)(DLManagedTensor* self);  ///< Called once by whoever took the capsule.
};

/// Fills a DLTensor that borrows from the object; 0, or -1 with an exception set.
using DLTensorFromObject = int (*)(void* object, DLTensor* out);

/// The function of a tensor type, from its `__dlpack_c_exchange_api__`; null where it has none, or
/// one of another major version.
DLTensorFromObject dltensor_function(PyTypeObject* type);

/// A capsule of one-dimensional uint8 host memory for `torch.from_dlpack`. Whoever takes it holds
/// `keep_alive` and drops it on any thread, with or without the GIL. REQUIRES: the GIL.
nanobind::object dlpack_capsule(std::byte* data, std::uint64_t bytes,
                                std::shared_ptr<const void> keep_alive);

/// The element type; nothing if it has no counterpart.
std::optional<DType> dtype_of(DLDataType type);

}  // namespace strandline::python
