// Hyper-connections (spec/v4.md 2.2 to 2.4).
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/row_layout.h"

namespace dsv4::cpu {

constexpr int64_t kMostStreams = 8;  // V4 has 4

// Collapses the residual streams of every token into one, and with `comb` says how its sub-block's
// output is mixed back. fn: n rows of n * d adjacent elements, or n * (n + 2) with `comb`; base, as
// many as fn has rows; scale: 1 or 3. y [T, d] of x's dtype, post [T, n] and comb [T, n, n] are
// contiguous.
struct HyperMix {
  DType dtype;
  const void* x;
  RowLayout x_rows;  // [T * n, d]
  int64_t streams;
  const float* fn;
  int64_t fn_stride;
  const float* base;
  int64_t base_stride;
  const float* scale;
  int64_t scale_stride;
  int64_t rounds;  // of Sinkhorn
  float norm_eps;
  float hc_eps;
  void* y;
  float* post;
  float* comb;        // null: only y
  bool hf32 = false;  // fn without the last 13 bits of its mantissas
};

// New streams post[k] * z + sum_j comb[j, k] * x[j], contiguous [T, n, d].
struct HyperPost {
  DType dtype;
  const void* z;
  RowLayout z_rows;  // [T, d]
  const void* x;
  RowLayout x_rows;  // [T * n, d]
  int64_t streams;
  const float* post;
  int64_t post_strides[2];
  const float* comb;
  int64_t comb_strides[3];
  void* y;
};

void hyper_mix(const HyperMix& call, Isa isa);
void hyper_post(const HyperPost& call, Isa isa);

}  // namespace dsv4::cpu
