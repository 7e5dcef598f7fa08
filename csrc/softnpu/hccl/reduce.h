// Reduction of the ranks' parts, in rank order on every rank, so that all see the same bits.
#pragma once

#include <cstddef>
#include <vector>

namespace softnpu {

// Data types and operations as HCCL numbers them.
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
  kHcclFp8E4M3 = 15,
  kHcclFp8E5M2 = 16,
};
enum HcclOperation : int { kHcclSum = 0, kHcclProd = 1, kHcclMax = 2, kHcclMin = 3 };

void reduce(const std::vector<const unsigned char*>& parts, unsigned char* to, size_t count, int dtype, int operation);

}  // namespace softnpu
