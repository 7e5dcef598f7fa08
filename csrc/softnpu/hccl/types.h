// Data types and operations as HCCL numbers them, and which of them a chip reduces.
#pragma once

#include <cstddef>

#include "softnpu/acl/config.h"

namespace softnpu::hccl {

enum HcclType : int {
  kHcclInt8 = 0,
  kHcclInt16 = 1,
  kHcclInt32 = 2,
  kHcclFp16 = 3,
  kHcclFp32 = 4,
  kHcclInt64 = 5,
  kHcclUint64 = 6,
  kHcclUint8 = 7,
  kHcclUint16 = 8,
  kHcclUint32 = 9,
  kHcclFp64 = 10,
  kHcclBfp16 = 11,
  kHcclHif8 = 14,
  kHcclFp8E4M3 = 15,
  kHcclFp8E5M2 = 16,
  kHcclFp8E8M0 = 17,
};
enum HcclOperation : int { kHcclSum = 0, kHcclProd = 1, kHcclMax = 2, kHcclMin = 3 };

size_t element_size(int dtype);
// Throws what the chip's HCCL refuses; `uneven`: HcclReduceScatterV.
void check_reduction(int dtype, int operation, Generation chip, bool uneven = false);

}  // namespace softnpu::hccl
