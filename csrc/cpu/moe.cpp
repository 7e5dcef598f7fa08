#include "moe.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "parallel_rows.h"
#include "scratch.h"

#define DSV4_ROWS "cpu/moe_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
namespace {

int64_t expert_of(const MoeDispatch& call, int64_t choice) {
  const int64_t token = choice / call.choices;
  return call.ids.at(token * call.ids_strides[0] + choice % call.choices * call.ids_strides[1],
                     call.experts);
}

void copy_rows(const MoeDispatch& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = call.order[row] / call.choices;
    std::memcpy(call.rows + row * call.row_bytes, call.x + token * call.x_stride_bytes,
                static_cast<size_t>(call.row_bytes));
  }
}

}  // namespace

void moe_dispatch(const MoeDispatch& call) {
  const int64_t rows = call.tokens * call.choices;
  int32_t* next = call.offsets;  // first how many an expert has, then where its next row goes
  std::fill_n(next, call.experts + 1, 0);
  for (int64_t choice = 0; choice < rows; ++choice) {
    ++next[expert_of(call, choice)];
  }
  int32_t total = 0;
  for (int64_t expert = 0; expert < call.experts; ++expert) {
    total += std::exchange(next[expert], total);
  }
  for (int64_t choice = 0; choice < rows; ++choice) {
    call.order[next[expert_of(call, choice)]++] = static_cast<int32_t>(choice);
  }
  // Every expert's next row is now where the next expert begins.
  std::copy_backward(next, next + call.experts, next + call.experts + 1);
  call.offsets[0] = 0;
  if (call.row_bytes > 0) {
    parallel_rows(call, rows, call.row_bytes, copy_rows);
  }
}

void moe_combine(MoeCombine call, Isa isa) {
  const int64_t rows = call.y_rows.count();
  auto* row_of = static_cast<int32_t*>(scratch(static_cast<size_t>(rows) * sizeof(int32_t)));
  std::fill_n(row_of, rows, 0);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t choice = call.order.at(row * call.order_stride, rows);
    row_of[choice] = static_cast<int32_t>(row);
  }
  call.row_of = row_of;
  parallel_rows(call, rows / call.k, call.k * call.y_rows.width(), DSV4_FOR_ISA(isa, combine_rows));
}

}  // namespace dsv4::cpu
