#include "int8_product.h"

#include <algorithm>
#include <cstring>

#include "cpu/expert_rows.h"
#include "cpu/parallel_rows.h"
#include "cpu/thread_buffer.h"

#define DSV4_ROWS "cpu/int8_product_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
namespace {

// Of weights that are widened or multiplied, where few rows share what is widened.
constexpr int64_t kWorkPerThread = 1 << 17;
constexpr int64_t kPanel = 16;         // in columns
constexpr int64_t kWidestVector = 32;  // in channels
// Rows of a power of two bytes fall into the same sets of a cache: one line more moves them apart.
constexpr int64_t kLine = 32;

thread_local ThreadBuffer sums_of_thread;
thread_local ThreadBuffer rows_of_thread;

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

struct WideRows {
  const int16_t* codes;
  int64_t stride;
};

WideRows wide_rows(const Int8Product& call, Isa isa) {
  const int64_t width = round_up(call.k, kWidestVector), stride = width + kLine;
  auto* rows = rows_of_thread.of<int16_t>(call.rows * stride);
  const auto widen = DSV4_FOR_ISA(isa, widen_int8_row);
  parallel_for(call.rows, grain_of(kWorkPerThread, stride), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t source = call.x.source != nullptr ? call.x.source[row] : row;
      widen(call.x.codes + source * call.x.row_stride, call.k, width, rows + row * stride);
    }
  });
  return {rows, stride};
}

void clear(const Int8Product& call, int64_t begin, int64_t end) {
  const auto values = static_cast<size_t>((end - begin) * call.n);
  if (call.sums != nullptr) {
    std::memset(call.sums + begin * call.n, 0, values * sizeof(int32_t));
  } else {
    std::memset(call.scaled + begin * call.n, 0, values * sizeof(BFloat16));
  }
}

}  // namespace

void int8_product(const Int8Product& call, Isa isa) {
  if (call.rows == 0 || call.n == 0) {
    return;
  }
  const std::vector<ExpertRows>& experts =
      rows_by_expert(call.offsets, call.experts, call.rows,
                     [&](int64_t begin, int64_t end) { clear(call, begin, end); });
  if (experts.empty()) {
    return;
  }
  const WideRows x = wide_rows(call, isa);
  int64_t most = 0;
  for (const ExpertRows& expert : experts) {
    most = std::max(most, expert.end - expert.begin);
  }
  const ExpertRows* active = experts.data();  // of this thread, which others cannot name
  const auto count = static_cast<int64_t>(experts.size());
  const int64_t most_panels = *DSV4_FOR_ISA(isa, kStripePanels);
  const int64_t panels = round_up(call.n, kPanel) / kPanel;
  const int64_t work = kPanel * call.k * (1 + call.rows / (4 * count));
  const auto run = DSV4_FOR_ISA(isa, int8_stripe);
  parallel_for(count * panels, grain_of(kWorkPerThread, work), [&](int64_t begin, int64_t end) {
    auto* sums = sums_of_thread.of<int32_t>(most * most_panels * kPanel);
    each_stripe(active, panels, most_panels, begin, end,
                [&](const ExpertRows& of, int64_t panel, int64_t some) {
                  run(call, x.codes, x.stride, of.expert, of.begin, of.end, panel * kPanel, some,
                      sums);
                });
  });
}

}  // namespace dsv4::cpu
