// Sparse shared-KV attention with a sink per head (spec/v4.md 4.6).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "cpu/paged.h"

namespace dsv4::cpu {

// Keys whose probabilities are rounded against one maximum, and as many on Ascend's chips.
constexpr int64_t kKeyTile = 64;
constexpr int64_t kAscendTile = 512;

// Every token attends to its list of keys: window rows in order, padded with "no key" to `window`
// places, then the chosen entries, or all visible ones. Rows are keys and values of all heads, in
// q's dtype. Probabilities are rounded to it against the largest score up to the end of their tile
// of places. The bits of a token's head depend on that token alone.
struct SparseAttention {
  DType dtype;
  int64_t tokens;
  int64_t heads;
  int64_t channels;
  const char* q;  // strides in bytes
  int64_t q_token_stride;
  int64_t q_head_stride;
  const float* sink;
  int64_t sink_stride;
  PagedRows near;
  PagedRows far;       // no data without compression
  bool chooses;        // entries; otherwise all visible ones are keys
  Int32Matrix chosen;  // [T, N]
  Batch batch;
  int64_t window;
  int64_t ratio;
  char* out;  // [T, H, D]
  int64_t tile = kKeyTile;
  bool sink_first = false;  // maximum and sum start from the sink, and entries with a tile

  // Where the places of entries begin.
  int64_t first_entry() const { return sink_first ? (window + tile - 1) / tile * tile : window; }
};

// The list of one token.
class KeyList {
 public:
  KeyList(const SparseAttention& call, int64_t token);

  // Keys of the next tile that has any, into `rows` [tile]; 0 behind the last.
  int64_t next(const char** rows);

 private:
  int64_t gather(int64_t place, const char** rows) const;

  const SparseAttention* call_;
  int64_t token_;
  int64_t sequence_ = 0;
  int64_t first_ = 0;  // position of the first window key
  int64_t near_ = 0;   // window keys
  int64_t far_ = 0;    // places behind the window
  int64_t place_ = 0;
};

void sparse_attention(const SparseAttention& call, Isa isa);

}  // namespace dsv4::cpu
