#include "product.h"

#include <algorithm>
#include <cstring>

#include "common/flush.h"
#include "cpu/expert_rows.h"
#include "cpu/parallel_rows.h"
#include "cpu/thread_buffer.h"

#define DSV4_ROWS "cpu/product_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
namespace {

constexpr int64_t kPanel = 16;
constexpr int64_t kBlock = 32;
// Of weights that are widened or multiplied, where few rows share what is widened.
constexpr int64_t kWorkPerThread = 1 << 17;

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

thread_local ThreadBuffer sums_of_thread;
thread_local ThreadBuffer rows_of_thread;

struct WideRows {
  const float* values;
  int64_t stride;
};

// The rows as fp32 with zeros up to a multiple of 32 channels: themselves where they are that.
WideRows wide_rows(const Product& call, int64_t count, Isa isa) {
  const Activations& x = call.x;
  if (x.format == Stored::f32 && call.k % kBlock == 0) {
    return {static_cast<const float*>(x.values), x.row_stride};
  }
  const int64_t stride = round_up(call.k, kBlock);
  float* rows = rows_of_thread.of<float>(count * stride);
  const auto widen = DSV4_FOR_ISA(isa, widen_activations);
  parallel_for(count, grain_of(kWorkPerThread, stride), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      widen(x, row, call.k, stride, rows + row * stride);
    }
  });
  return {rows, stride};
}

void clear(const Product& call, int64_t begin, int64_t end) {
  const int64_t bytes = bytes_of(call.dtype);
  for (int64_t row = begin; row < end; ++row) {
    std::memset(static_cast<uint8_t*>(call.y) + row * call.y_row_stride * bytes, 0,
                static_cast<size_t>(call.n * bytes));
  }
}

}  // namespace

void product(const Product& call, Isa isa) {
  if (call.rows == 0 || call.n == 0) {
    return;
  }
  const std::vector<ExpertRows>& experts =
      rows_by_expert(call.offsets, call.experts, call.rows,
                     [&](int64_t begin, int64_t end) { clear(call, begin, end); });
  if (experts.empty()) {
    return;
  }
  const WideRows x = wide_rows(call, call.rows, isa);
  int64_t most = 0;
  for (const ExpertRows& expert : experts) {
    most = std::max(most, expert.end - expert.begin);
  }
  const ExpertRows* active = experts.data();  // of this thread, which others cannot name
  const auto count = static_cast<int64_t>(experts.size());
  const int64_t panels = round_up(call.n, kPanel) / kPanel;
  const int64_t work = kPanel * call.k * (1 + call.rows / (4 * count));
  const auto run = DSV4_FOR_ISA(isa, product_panel);
  parallel_for(count * panels, grain_of(kWorkPerThread, work), [&](int64_t begin, int64_t end) {
    float* sums = sums_of_thread.of<float>(most * kPanel);
    for (int64_t item = begin; item < end; ++item) {
      const ExpertRows& of = active[item / panels];
      run(call, x.values, x.stride, of.expert, of.begin, of.end, item % panels * kPanel, sums);
    }
  });
}

}  // namespace dsv4::cpu
