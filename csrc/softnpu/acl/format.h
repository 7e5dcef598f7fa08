// Descriptions of tensors on the graph-operator path, and the one operator of it that is emulated.
#pragma once

#include <vector>

#include "tensor.h"

namespace softnpu {

struct Description {
  int dtype, format;
  std::vector<int64_t> origin;  // sizes of the tensor
  std::vector<int64_t> dims;    // sizes of its storage
};

struct Buffer {
  void* data;
  size_t size;
};

// Between the NZ format and rows and columns.
int format_cast(const Description& source, const Buffer& from, const Description& target, const Buffer& to,
                Handle stream);

}  // namespace softnpu
