// Copies of rows into a cache whose blocks have any strides.
#pragma once

#include <cstdint>

namespace dsv4::cpu {

// cache[slot / block_size][slot % block_size] = row for every slot of the cache; others are
// skipped. Strides in bytes, but that of slots in elements.
struct WriteRows {
  char* cache;
  int64_t num_blocks;
  int64_t block_size;
  int64_t block_stride;
  int64_t row_stride;
  const char* rows;
  int64_t rows_stride;
  int64_t row_bytes;
  const int64_t* slots;
  int64_t slots_stride;
  int64_t count;
};

void write_rows(const WriteRows& call);

}  // namespace dsv4::cpu
