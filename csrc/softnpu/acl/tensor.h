// The argument objects of the two-phase operator interface, and the launch that phase 1 prepares
// and phase 2 enqueues.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "abi.h"

struct aclOpExecutor;

struct aclTensor {
  std::vector<int64_t> sizes, strides, storage;
  int64_t offset;
  int dtype, format;
  void* data;
};

struct aclScalar {
  int dtype;
  alignas(16) unsigned char bytes[16];
};

struct aclIntArray {
  std::vector<int64_t> values;
};
struct aclBoolArray {
  std::vector<bool> values;
};
struct aclFloatArray {
  std::vector<float> values;
};
struct aclTensorList {
  std::vector<aclTensor*> tensors;
};  // owns them, as CANN's does
struct aclScalarList {
  std::vector<aclScalar*> scalars;
};

namespace softnpu {

// One piece of device memory that a launch uses.
struct Access {
  const void* pointer;
  size_t bytes;
  uint64_t allocation;
};

struct Launch {
  std::string name, arguments;
  std::vector<Access> accesses;
  std::function<void()> kernel;                    // may run many times
  std::function<void(const std::string&)> failed;  // told why, when it failed or was skipped
  std::function<void()> resolve;  // set: the kernel's output shape depends on data, phase 2 waits
                                  // for it and then calls this
  uint64_t prepared_ns = 0;
  size_t workspace = 0;     // bytes that phase 1 asked for ...
  void* scratch = nullptr;  // ... and where phase 2 was given them: overwritten before every run
};

SOFTNPU_CXX size_t dtype_bits(int dtype);
SOFTNPU_CXX const char* dtype_name(int dtype);
SOFTNPU_CXX std::string describe(const aclTensor& tensor);
// First byte and length that the view touches, relative to `data`.
SOFTNPU_CXX void extent(const aclTensor& tensor, int64_t* first, size_t* bytes);
// Bytes of the storage that the view lies in; -1 when its dimensions were not given.
SOFTNPU_CXX int64_t storage_bytes(const aclTensor& tensor);
// The NZ layout: matrices of [rows, columns] in tiles of 16 rows by C0 columns, tiles column by
// column, padded.
SOFTNPU_CXX int64_t tile_width(const aclTensor& tensor);  // C0 in values; 0: not in that layout
struct SOFTNPU_CXX Tiles {
  int64_t batch, rows, columns, width;  // width and columns in units of `unit` bytes
  size_t unit;
  size_t bytes(bool tiled) const;
};
SOFTNPU_CXX void retile(const Tiles& tiles, char* tiled, char* plain, bool to_tiles);
SOFTNPU_CXX int enqueue(const std::shared_ptr<Launch>& launch, Handle stream);

// Fault when argument number `index`, or a member of that list, is a handle that is not alive; null
// is for its reader to judge.
SOFTNPU_CXX void refuse_dead(const aclTensor* handle, int index);
SOFTNPU_CXX void refuse_dead(const aclScalar* handle, int index);
SOFTNPU_CXX void refuse_dead(const aclIntArray* handle, int index);
SOFTNPU_CXX void refuse_dead(const aclBoolArray* handle, int index);
SOFTNPU_CXX void refuse_dead(const aclFloatArray* handle, int index);
SOFTNPU_CXX void refuse_dead(const aclTensorList* handle, int index);
SOFTNPU_CXX void refuse_dead(const aclScalarList* handle, int index);
inline void refuse_dead(const char*, int) {}
template <class Number>
  requires(!std::is_pointer_v<Number>)
void refuse_dead(Number, int) {}

}  // namespace softnpu

// An executor is good for one phase 2, or one destruction: true the first time, for a live one.
namespace softnpu {
SOFTNPU_CXX void live_executor(aclOpExecutor* executor);
SOFTNPU_CXX bool take_executor(aclOpExecutor* executor);
}  // namespace softnpu

struct aclOpExecutor {
  std::shared_ptr<softnpu::Launch> launch;
};
