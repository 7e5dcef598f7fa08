// What this project calls of CANN's C interface, declared by us: it builds with no CANN present.
#pragma once

#include <cstdint>

namespace dsv4::npu {

struct AclTensor;  // opaque objects of the runtime
struct AclTensorList;
struct AclIntArray;
struct AclScalar;
struct AclExecutor;

// aclDataType and aclFormat, as CANN's documents number them.
enum class AclType : int {
  f32 = 0,
  f16 = 1,
  i8 = 2,
  i32 = 3,
  u8 = 4,
  i64 = 9,
  boolean = 12,
  bf16 = 27,
  e4m3 = 36,
  e8m0 = 37,
  e2m1 = 40,
};
enum class AclFormat : int { nd = 2, nz_of_32 = 51 };  // FRACTAL_NZ_C0_32

using CreateTensor = AclTensor* (*)(const int64_t* sizes, uint64_t rank, AclType,
                                    const int64_t* strides, int64_t offset, AclFormat,
                                    const int64_t* storage, uint64_t storage_rank, void* data);
using DestroyTensor = int (*)(const AclTensor*);
using CreateTensorList = AclTensorList* (*)(AclTensor* const* tensors, uint64_t count);
using DestroyTensorList = int (*)(const AclTensorList*);  // its tensors too
using CreateIntArray = AclIntArray* (*)(const int64_t* values, uint64_t count);
using DestroyIntArray = int (*)(const AclIntArray*);
using CreateScalar = AclScalar* (*)(void* value, AclType);
using DestroyScalar = int (*)(const AclScalar*);
using RecentErrorText = const char* (*)();

// Phase 2 of every operator.
using Phase2 = int (*)(void* workspace, uint64_t bytes, AclExecutor*, void* stream);

}  // namespace dsv4::npu
