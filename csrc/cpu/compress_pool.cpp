#include "cpu/compress_pool.h"

#include <cstring>

#include "cpu/parallel_rows.h"
#include "cpu/thread_buffer.h"

#define DSV4_ROWS "cpu/compress_pool_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
namespace {

constexpr int64_t kTokensWidened = 64;  // fp32 tokens that are kept at a time

int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// The state rows of some tokens.
void find_rows(const CompressPool& call, int64_t first, int64_t tokens, StateRow* rows) {
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t s = call.batch.sequence_of(first + t);
    const int64_t position = call.batch.position_of(first + t, s);
    // A position before the sequence has no row.
    auto* row = reinterpret_cast<float*>(call.state.row(s, position));
    rows[t] = {row, call.ape + (position < 0 ? 0 : position % call.ratio) * call.ape_stride};
  }
}

void store_states(const CompressPool& call, Isa isa) {
  thread_local ThreadBuffer wide, found;
  const int64_t some = std::min(call.tokens, kTokensWidened);
  float* x = wide.of<float>(some * call.channels);
  auto* rows = found.of<StateRow>(some);
  const auto widen = DSV4_FOR_ISA(isa, widen_tokens);
  const auto project = DSV4_FOR_ISA(isa, project_weight_rows);
  for (int64_t first = 0; first < call.tokens; first += some) {
    const int64_t tokens = std::min(some, call.tokens - first);
    find_rows(call, first, tokens, rows);
    widen(call, first, tokens, x);
    const int64_t grain =
        std::max<int64_t>(6, grain_of(kProductsPerThread, tokens * call.channels));
    parallel_for(2 * call.width, grain,
                 [&](int64_t begin, int64_t end) { project(call, x, rows, tokens, begin, end); });
  }
}

// Visits (entry, sequence, block) of every block that closes.
template <class Visit>
void each_closed(const CompressPool& call, const Visit& visit) {
  int64_t entry = 0;
  for (int64_t s = 0; s < call.batch.sequences(); ++s) {
    const int64_t length = call.batch.length(s);
    const int64_t after = floor_divide(length, call.ratio);
    for (int64_t block = floor_divide(length - call.batch.tokens(s), call.ratio);
         block < after && entry < call.entry_rows; ++block, ++entry) {
      visit(entry, s, block);
    }
  }
}

// Values of the tokens that an entry pools.
int64_t find_slots(const CompressPool& call, int64_t s, int64_t block, const float** slots) {
  const int64_t groups = call.width / call.head_dim;
  int64_t count = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = (block + 1 - groups + group) * call.ratio;
    for (int64_t position = first; position < first + call.ratio; ++position) {
      if (const auto* row = reinterpret_cast<const float*>(call.state.row(s, position))) {
        slots[count++] = row + group * call.head_dim;
      }
    }
  }
  return count;
}

struct ClosedBlock {
  int64_t sequence;
  int64_t block;
};

void pool_entries(const CompressPool& call, Isa isa) {
  thread_local ThreadBuffer closed;
  auto* blocks = closed.of<ClosedBlock>(std::max<int64_t>(call.entry_rows, 1));
  int64_t entries = 0;
  each_closed(call, [&](int64_t entry, int64_t s, int64_t block) {
    blocks[entry] = {s, block};
    entries = entry + 1;
  });
  const int64_t entry_bytes = call.head_dim * bytes_of(call.dtype);
  std::memset(call.entries + entries * entry_bytes, 0,
              static_cast<size_t>((call.entry_rows - entries) * entry_bytes));
  const int64_t products = call.ratio * call.width * 8;
  const auto pool = DSV4_FOR_ISA(isa, pool_entry);
  parallel_for(entries, grain_of(kProductsPerThread, products), [&](int64_t begin, int64_t end) {
    thread_local ThreadBuffer buffer;
    const auto** slots = buffer.of<const float*>(call.width / call.head_dim * call.ratio);
    for (int64_t entry = begin; entry < end; ++entry) {
      const auto [s, block] = blocks[entry];
      const int64_t count = find_slots(call, s, block, slots);
      if (count > 0) {
        pool(call, slots, count, entry);
      } else {
        std::memset(call.entries + entry * entry_bytes, 0, static_cast<size_t>(entry_bytes));
      }
    }
  });
}

}  // namespace

void compress_pool(const CompressPool& call, Isa isa) {
  if (call.tokens == 0) {
    return;
  }
  if (call.batch.sequences() > 0) {
    store_states(call, isa);
  }
  pool_entries(call, isa);
}

}  // namespace dsv4::cpu
