// Index tensors of either integer type.
#pragma once

#include <cstdint>

namespace dsv4 {

struct Indices {
  const void* data;
  bool wide;  // int64, else int32

  int64_t at(int64_t offset) const {
    return wide ? static_cast<const int64_t*>(data)[offset]
                : static_cast<const int32_t*>(data)[offset];
  }

  // Within [0, size), whatever is there: values may not have been checked.
  int64_t at(int64_t offset, int64_t size) const {
    const int64_t value = at(offset);
    return value < 0 ? 0 : (value < size ? value : size - 1);
  }
};

}  // namespace dsv4
