// What the lightning indexer scores with, in int8 (spec/v4.md 4.5, spec/deployments.md 8): its
// steps are the kernels of the operators that indexer_prolog_int8 joins.
#pragma once

#include "common/isa.h"
#include "cpu/cache_bytes.h"
#include "cpu/int8_product.h"

namespace dsv4::cpu {

// Rows [count, channels] of bf16, strides in elements.
struct BFloat16Rows {
  const BFloat16* values;
  int64_t count;
  int64_t stride;
};

// Rows [count, width] of fp32, one per row that is turned.
struct Angles {
  const float* cos;
  int64_t cos_stride;
  const float* sin;
  int64_t sin_stride;
};

struct IndexerProlog {
  BFloat16Rows x;  // [tokens, width]
  int64_t width;
  Int8Rows qr;      // [tokens, k]
  Int8Weight wq_b;  // [heads * channels, k]
  int64_t k;
  BFloat16Rows weights_proj;  // [heads, width]
  BFloat16Rows pooled;        // [entries, channels]
  const BFloat16* k_norm;
  float eps;
  int64_t channels;
  int64_t turned;  // channels, the last ones
  Angles of_tokens;
  Angles of_entries;
  EntrySlots keys;
  int8_t* q;      // [tokens, heads, channels]
  Half* q_scale;  // [tokens, heads]
  Half* weights;  // [tokens, heads]
};

void indexer_prolog(const IndexerProlog& call, Isa isa);

}  // namespace dsv4::cpu
