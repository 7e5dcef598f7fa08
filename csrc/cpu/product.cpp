#include "product.h"

#include <algorithm>
#include <vector>

#include "common/flush.h"
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
thread_local std::vector<int64_t> experts_of_thread;

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

}  // namespace

void product(const Product& call, Isa isa) {
  const int64_t count = call.offsets[call.experts];
  if (count == 0 || call.n == 0) {
    return;
  }
  const WideRows x = wide_rows(call, count, isa);
  experts_of_thread.clear();
  int64_t most = 0;
  for (int64_t e = 0; e < call.experts; ++e) {
    if (const int64_t rows = call.offsets[e + 1] - call.offsets[e]; rows > 0) {
      experts_of_thread.push_back(e);
      most = std::max(most, rows);
    }
  }
  const int64_t* experts = experts_of_thread.data();
  const int64_t panels = round_up(call.n, kPanel) / kPanel;
  const int64_t active = static_cast<int64_t>(experts_of_thread.size());
  const int64_t work = kPanel * call.k * (1 + count / (4 * active));
  const auto run = DSV4_FOR_ISA(isa, product_panel);
  parallel_for(active * panels, grain_of(kWorkPerThread, work), [&](int64_t begin, int64_t end) {
    float* sums = sums_of_thread.of<float>(most * kPanel);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t e = experts[item / panels];
      run(call, x.values, x.stride, e, call.offsets[e], call.offsets[e + 1], item % panels * kPanel,
          sums);
    }
  });
}

}  // namespace dsv4::cpu
