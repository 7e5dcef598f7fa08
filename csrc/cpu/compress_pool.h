// The KV compressor up to its pooled entries, over a paged state (spec/v4.md 4.3).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "cpu/paged.h"

namespace dsv4::cpu {

// A weight [width, channels] of adjacent channels; stride in bytes.
struct ProjectionWeight {
  DType dtype;
  const char* data;
  int64_t row_stride;
};

// Writes [u | s + ape] of every token into the state, then pools every block of `ratio` tokens that
// closes in this call into one entry: per channel a softmax of s over the block's tokens, and with
// width 2 * head_dim those of the block before it. The bits of a token's state row depend on that
// token alone, those of an entry on the rows that it reads.
struct CompressPool {
  DType dtype;  // of x and of the entries
  int64_t tokens;
  int64_t channels;
  int64_t width;
  int64_t head_dim;
  const char* x;  // stride in bytes
  int64_t x_stride;
  ProjectionWeight value;
  ProjectionWeight gate;
  const float* ape;  // [ratio, width]
  int64_t ape_stride;
  int64_t ratio;
  PagedRows state;  // fp32 rows [2 * width]
  Batch batch;
  char* entries;  // [entry_rows, head_dim]
  int64_t entry_rows;
};

// Where a token's row is, null if nowhere, and what is added to its scores.
struct StateRow {
  float* row;
  const float* ape;
};

void compress_pool(const CompressPool& call, Isa isa);

}  // namespace dsv4::cpu
