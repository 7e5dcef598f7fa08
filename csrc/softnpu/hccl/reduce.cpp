#include "reduce.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "softnpu/acl/report.h"

namespace softnpu::hccl {
namespace {

struct BFloat16 {
  uint16_t bits;
  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
  static BFloat16 from(float value) {
    const uint32_t word = std::bit_cast<uint32_t>(value);
    if (std::isnan(value)) return {0x7FC0};
    return {static_cast<uint16_t>((word + 0x7FFF + ((word >> 16) & 1)) >> 16)};
  }
};

template <class T>
T load(const unsigned char* from, size_t index) {
  T value;
  std::memcpy(&value, from + index * sizeof(T), sizeof(T));
  return value;
}

template <class Wide>
Wide combine(Wide a, Wide b, int operation) {
  switch (operation) {
    case kHcclSum:
      return static_cast<Wide>(a + b);
    case kHcclProd:
      return static_cast<Wide>(a * b);
    case kHcclMax:
      return std::max(a, b);
    default:
      return std::min(a, b);
  }
}

template <class Stored, class Wide, class Narrow>
void run(const std::vector<const unsigned char*>& parts, unsigned char* to, size_t count,
         int operation, Narrow narrow) {
  for (size_t i = 0; i < count; ++i) {
    Wide value = static_cast<Wide>(load<Stored>(parts[0], i));
    for (size_t part = 1; part < parts.size(); ++part)
      value = combine<Wide>(value, static_cast<Wide>(load<Stored>(parts[part], i)), operation);
    const Stored result = narrow(value);
    std::memcpy(to + i * sizeof(Stored), &result, sizeof result);
  }
}

template <class T>
void same(const std::vector<const unsigned char*>& parts, unsigned char* to, size_t count,
          int operation) {
  run<T, T>(parts, to, count, operation, [](T value) { return value; });
}

}  // namespace

void reduce(const std::vector<const unsigned char*>& parts, unsigned char* to, size_t count,
            int dtype, int operation) {
  if (operation < kHcclSum || operation > kHcclMin)
    throw Fault(kParameter, "softnpu: HCCL reduction " + std::to_string(operation));
  switch (dtype) {
    case kHcclInt8:
      return same<int8_t>(parts, to, count, operation);
    case kHcclInt16:
      return same<int16_t>(parts, to, count, operation);
    case kHcclInt32:
      return same<int32_t>(parts, to, count, operation);
    case kHcclInt64:
      return same<int64_t>(parts, to, count, operation);
    case kHcclUint64:
      return same<uint64_t>(parts, to, count, operation);
    case kHcclFp32:
      return same<float>(parts, to, count, operation);
    case kHcclFp64:
      return same<double>(parts, to, count, operation);
    case kHcclFp16:
      return run<_Float16, float>(parts, to, count, operation,
                                  [](float value) { return static_cast<_Float16>(value); });
    case kHcclBfp16:
      return run<BFloat16, float>(parts, to, count, operation, BFloat16::from);
    default:
      throw Fault(kParameter, "softnpu: HCCL cannot reduce data type " + std::to_string(dtype));
  }
}

}  // namespace softnpu::hccl
