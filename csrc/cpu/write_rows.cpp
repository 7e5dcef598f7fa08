#include "cpu/write_rows.h"

#include <cstring>

namespace dsv4::cpu {

void write_rows(const WriteRows& call) {
  for (int64_t i = 0; i < call.count; ++i) {
    const int64_t slot = call.slots[i * call.slots_stride];
    const int64_t block = slot / call.block_size;
    if (slot < 0 || block >= call.num_blocks) {
      continue;
    }
    char* to =
        call.cache + block * call.block_stride + (slot - block * call.block_size) * call.row_stride;
    std::memcpy(to, call.rows + i * call.rows_stride, static_cast<size_t>(call.row_bytes));
  }
}

}  // namespace dsv4::cpu
