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
// Rows of a power of two bytes fall into the same sets of a cache: one line more moves them apart.
constexpr int64_t kLine = 16;
// Of weights that are widened or multiplied, where few rows share what is widened.
constexpr int64_t kWorkPerThread = 1 << 17;

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

thread_local ThreadBuffer sums_of_thread;
thread_local ThreadBuffer rows_of_thread;

struct WideRows {
  const float* values;
  int64_t stride;
};

// Whether rows of fp32 are as they should be: whole blocks, and apart in a cache if they are many.
bool are_wide(const Activations& x, int64_t count, int64_t k) {
  return x.format == Stored::f32 && k % kBlock == 0 && (count < 4 || x.row_stride % 256 != 0);
}

// The rows as fp32 with zeros up to a multiple of 32 channels.
WideRows wide_rows(const Product& call, int64_t count, Isa isa) {
  const Activations& x = call.x;
  if (are_wide(x, count, call.k)) {
    return {static_cast<const float*>(x.values), x.row_stride};
  }
  const int64_t stride = round_up(call.k, kBlock) + kLine;
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
  const int64_t most_panels = *DSV4_FOR_ISA(isa, kStripePanels);
  const int64_t panels = round_up(call.n, kPanel) / kPanel;
  const int64_t work = kPanel * call.k * (1 + call.rows / (4 * count));
  const auto run = DSV4_FOR_ISA(isa, product_stripe);
  parallel_for(count * panels, grain_of(kWorkPerThread, work), [&](int64_t begin, int64_t end) {
    float* sums = sums_of_thread.of<float>(most * most_panels * kPanel);
    each_stripe(active, panels, most_panels, begin, end,
                [&](const ExpertRows& of, int64_t panel, int64_t some) {
                  run(call, x.values, x.stride, of.expert, of.begin, of.end, panel * kPanel, some,
                      sums);
                });
  });
}

}  // namespace dsv4::cpu
