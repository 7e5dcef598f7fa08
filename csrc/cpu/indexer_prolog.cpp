#include "indexer_prolog.h"

#include <array>

#include "common/row_layout.h"
#include "cpu/hadamard.h"
#include "cpu/product.h"
#include "cpu/rms_norm.h"
#include "cpu/rope.h"
#include "cpu/thread_buffer.h"
#include "cpu/token_quant.h"

namespace dsv4::cpu {
namespace {

// What is between the steps of a call.
struct Buffers {
  ThreadBuffer rows, rotated, numbers;
};

thread_local Buffers buffers_of_thread;

// [tokens, rows of a token, channels], adjacent rows.
RowLayout layout_of(int64_t tokens, int64_t rows, int64_t channels) {
  const std::array<int64_t, 3> sizes{tokens, rows, channels};
  const std::array<int64_t, 3> strides{rows * channels, channels, 1};
  return {sizes, strides};
}

// Rows [tokens, rows of a token, channels] after RoPE, in place, and the +-1 Hadamard matrix.
BFloat16* rotate(BFloat16* rows, int64_t tokens, int64_t of_token, const Angles& angles,
                 const IndexerProlog& call, Isa isa) {
  const RowLayout layout = layout_of(tokens, of_token, call.channels);
  apply_rope({DType::bf16, rows, layout, tokens, call.turned, angles.cos, angles.cos_stride,
              angles.sin, angles.sin_stride},
             isa);
  auto* rotated = buffers_of_thread.rotated.of<BFloat16>(tokens * of_token * call.channels);
  hadamard({DType::bf16, rows, layout, rotated, false}, isa);
  return rotated;
}

void to_half(const float* from, int64_t count, Half* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_float<Half>(from[i]);
}

void make_queries(const IndexerProlog& call, Isa isa) {
  const int64_t tokens = call.x.count, heads = call.weights_proj.count;
  const std::array<int32_t, 2> offsets{0, static_cast<int32_t>(tokens)};
  auto* q = buffers_of_thread.rows.of<BFloat16>(tokens * heads * call.channels);
  int8_product({.rows = tokens,
                .n = heads * call.channels,
                .k = call.k,
                .x = call.qr,
                .weight = call.wq_b,
                .offsets = offsets.data(),
                .experts = 1,
                .sums = nullptr,
                .scaled = q},
               isa);
  const BFloat16* rotated = rotate(q, tokens, heads, call.of_tokens, call, isa);
  auto* scales = buffers_of_thread.numbers.of<float>(tokens * heads);
  token_quant({TokenFormat::int8, DType::bf16, rotated, layout_of(tokens, heads, call.channels),
               nullptr, 0.0f, reinterpret_cast<uint8_t*>(call.q), scales},
              isa);
  to_half(scales, tokens * heads, call.q_scale);
}

void write_keys(const IndexerProlog& call, Isa isa) {
  const int64_t entries = call.pooled.count;
  const std::array<int64_t, 2> sizes{entries, call.channels};
  const std::array<int64_t, 2> strides{call.pooled.stride, 1};
  auto* keys = buffers_of_thread.rows.of<BFloat16>(entries * call.channels);
  rms_norm({DType::bf16, call.pooled.values, RowLayout(sizes, strides), DType::bf16, call.k_norm,
            call.eps, keys, layout_of(entries, 1, call.channels)},
           isa);
  const BFloat16* rotated = rotate(keys, entries, 1, call.of_entries, call, isa);
  write_entries(call.keys, DType::bf16, reinterpret_cast<const char*>(rotated),
                call.channels * static_cast<int64_t>(sizeof(BFloat16)));
}

void weigh_heads(const IndexerProlog& call, Isa isa) {
  const int64_t tokens = call.x.count, heads = call.weights_proj.count;
  const std::array<int32_t, 2> offsets{0, static_cast<int32_t>(tokens)};
  auto* sums = buffers_of_thread.numbers.of<float>(tokens * heads);
  product({tokens,
           heads,
           call.width,
           {Stored::bf16, call.x.values, call.x.stride},
           {Stored::bf16, sizeof(BFloat16), call.weights_proj.values, 0, call.weights_proj.stride},
           offsets.data(),
           1,
           DType::f32,
           sums,
           heads},
          isa);
  to_half(sums, tokens * heads, call.weights);
}

}  // namespace

void indexer_prolog(const IndexerProlog& call, Isa isa) {
  make_queries(call, isa);
  write_keys(call, isa);
  weigh_heads(call, isa);
}

}  // namespace dsv4::cpu
