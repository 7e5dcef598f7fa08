#include "int8_moe.h"

#include <array>

#include "cpu/int8_swiglu.h"
#include "cpu/moe.h"
#include "cpu/parallel_rows.h"
#include "cpu/thread_buffer.h"
#include "cpu/token_quant.h"

namespace dsv4::cpu {

// y holds the shared expert's rows and becomes the sums.
struct ChoiceSum {
  int64_t channels;
  int64_t choices;
  const BFloat16* routed;  // a row per choice
  const int32_t* row_of;   // choice -> its row
  const float* weights;
  int64_t weights_strides[2];
  BFloat16* y;
};

}  // namespace dsv4::cpu

#define DSV4_ROWS "cpu/int8_moe_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
namespace {

// What is between the steps of a call.
struct Buffers {
  ThreadBuffer codes, scales;                   // of x
  ThreadBuffer offsets, order, tokens, chosen;  // of routing
  ThreadBuffer row_scales, sums, inner, inner_scales, routed;
};

thread_local Buffers buffers_of_thread;

// Rows through one set of experts.
struct Pass {
  int64_t rows;
  Int8Rows x;
  const float* x_scale;  // of each row
  const int32_t* offsets;
  int64_t experts;
};

void run_experts(const Int8Moe& call, const Pass& pass, const Int8Expert& expert, BFloat16* y,
                 Isa isa) {
  Buffers& buffers = buffers_of_thread;
  const int64_t channels = call.x_rows.width(), width = call.width;
  auto* sums = buffers.sums.of<int32_t>(pass.rows * 2 * width);
  auto* inner = buffers.inner.of<int8_t>(pass.rows * width);
  auto* inner_scales = buffers.inner_scales.of<float>(pass.rows);
  int8_product({.rows = pass.rows,
                .n = 2 * width,
                .k = channels,
                .x = pass.x,
                .weight = expert.w13,
                .offsets = pass.offsets,
                .experts = pass.experts,
                .sums = sums,
                .scaled = nullptr},
               isa);
  int8_swiglu_quant({.rows = pass.rows,
                     .width = width,
                     .sums = sums,
                     .sums_stride = 2 * width,
                     .weight_scale = static_cast<const float*>(expert.w13.scale),
                     .weight_scale_stride = expert.w13.scale_expert_stride,
                     .x_scale = pass.x_scale,
                     .x_scale_stride = 1,
                     .offsets = pass.offsets,
                     .experts = pass.experts,
                     .limit = call.limit,
                     .codes = inner,
                     .scales = inner_scales},
                    isa);
  int8_product({.rows = pass.rows,
                .n = channels,
                .k = width,
                .x = {inner, width, nullptr, inner_scales, 1},
                .weight = expert.w2,
                .offsets = pass.offsets,
                .experts = pass.experts,
                .sums = nullptr,
                .scaled = y},
               isa);
}

}  // namespace

void int8_moe(const Int8Moe& call, Isa isa) {
  Buffers& buffers = buffers_of_thread;
  const int64_t tokens = call.x_rows.count(), channels = call.x_rows.width();
  const int64_t chosen = tokens * call.choices;
  auto* codes = buffers.codes.of<uint8_t>(tokens * channels);
  auto* scales = buffers.scales.of<float>(tokens);
  token_quant({TokenFormat::int8, DType::bf16, call.x, call.x_rows, nullptr, 0.0f, codes, scales},
              isa);
  const auto* x = reinterpret_cast<const int8_t*>(codes);

  auto* offsets = buffers.offsets.of<int32_t>(call.experts + 1);
  auto* order = buffers.order.of<int32_t>(chosen);
  moe_dispatch({nullptr,
                0,
                0,
                call.ids,
                tokens,
                call.choices,
                {call.ids_strides[0], call.ids_strides[1]},
                call.experts,
                nullptr,
                offsets,
                order});
  auto* token_of = buffers.tokens.of<int32_t>(chosen);
  auto* row_of = buffers.chosen.of<int32_t>(chosen);
  auto* row_scales = buffers.row_scales.of<float>(chosen);
  for (int64_t row = 0; row < chosen; ++row) {
    token_of[row] = static_cast<int32_t>(order[row] / call.choices);
    row_of[order[row]] = static_cast<int32_t>(row);
    row_scales[row] = scales[token_of[row]];
  }

  auto* routed = buffers.routed.of<BFloat16>(chosen * channels);
  run_experts(call,
              {chosen, {x, channels, token_of, nullptr, 0}, row_scales, offsets, call.experts},
              call.routed, routed, isa);
  const std::array<int32_t, 2> all{0, static_cast<int32_t>(tokens)};
  run_experts(call, {tokens, {x, channels, nullptr, nullptr, 0}, scales, all.data(), 1},
              call.shared, call.y, isa);
  const ChoiceSum sum{channels, call.choices, routed,
                      row_of,   call.weights, {call.weights_strides[0], call.weights_strides[1]},
                      call.y};
  parallel_rows(sum, tokens, (1 + call.choices) * channels, DSV4_FOR_ISA(isa, add_choices));
}

}  // namespace dsv4::cpu
