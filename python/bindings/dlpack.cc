#include "dlpack.h"

#include <utility>

#include "objects.h"

namespace strandline::python {
namespace {

// What the capsule `__dlpack_c_exchange_api__` points to.
struct ExchangeApi {
  std::uint32_t major;
  std::uint32_t minor;
  const void* previous;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_object)();
  void (*managed_tensor_to_object)();
  DLTensorFromObject dltensor_from_object;  // May be null.
  void (*current_work_stream)();
};

struct KnownType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  DType dtype;
};

// Codes: 0 int, 1 uint, 2 float, 4 bfloat, 5 complex, 6 bool, 10 … 14 float8, 17 float4.
constexpr KnownType kKnownTypes[] = {
    {2, 32, 1, DType::kF32},        {4, 16, 1, DType::kBF16},   {2, 16, 1, DType::kF16},
    {0, 64, 1, DType::kI64},        {2, 64, 1, DType::kF64},    {0, 32, 1, DType::kI32},
    {1, 8, 1, DType::kU8},          {6, 8, 1, DType::kBool},    {0, 8, 1, DType::kI8},
    {0, 16, 1, DType::kI16},        {1, 16, 1, DType::kU16},    {1, 32, 1, DType::kU32},
    {1, 64, 1, DType::kU64},        {5, 64, 1, DType::kC64},    {10, 8, 1, DType::kF8E4M3},
    {11, 8, 1, DType::kF8E4M3FNUZ}, {12, 8, 1, DType::kF8E5M2}, {13, 8, 1, DType::kF8E5M2FNUZ},
    {14, 8, 1, DType::kF8E8M0},     {17, 4, 2, DType::kF4},
};

constexpr const char* kCapsuleName = "dltensor";

struct OwnedMemory {
  DLManagedTensor managed{};
  std::int64_t extent = 0;
  std::int64_t stride = 1;
  std::shared_ptr<const void> keep_alive;
};

void drop(DLManagedTensor* managed) { delete static_cast<OwnedMemory*>(managed->owner); }

// Whoever takes the memory renames the capsule; memory that nobody took is dropped with it.
void drop_untaken(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kCapsuleName) == 0) return;
  drop(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsuleName)));
}

}  // namespace

nanobind::object dlpack_capsule(std::byte* data, std::uint64_t bytes,
                                std::shared_ptr<const void> keep_alive) {
  auto memory = std::make_unique<OwnedMemory>();
  memory->extent = static_cast<std::int64_t>(bytes);
  memory->keep_alive = std::move(keep_alive);
  constexpr DLDataType kByte{.code = 1, .bits = 8, .lanes = 1};
  memory->managed.tensor = {.data = data,
                            .device = {.type = kDLCpu, .index = 0},
                            .dimensions = 1,
                            .dtype = kByte,
                            .shape = &memory->extent,
                            .strides = &memory->stride,
                            .byte_offset = 0};
  memory->managed.owner = memory.get();
  memory->managed.deleter = &drop;
  nanobind::object capsule = checked(PyCapsule_New(&memory->managed, kCapsuleName, &drop_untaken));
  (void)memory.release();  // The capsule's now.
  return capsule;
}

DLTensorFromObject dltensor_function(PyTypeObject* type) {
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  const nanobind::object held = nanobind::steal(capsule);
  const auto* api =
      capsule == nullptr
          ? nullptr
          : static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  constexpr std::uint32_t kMajor = 1;
  return api->major == kMajor ? api->dltensor_from_object : nullptr;
}

std::optional<DType> dtype_of(DLDataType type) {
  for (const KnownType& known : kKnownTypes) {
    if (known.code == type.code && known.bits == type.bits && known.lanes == type.lanes) {
      return known.dtype;
    }
  }
  return std::nullopt;
}

}  // namespace strandline::python
