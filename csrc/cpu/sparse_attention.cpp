#include "cpu/sparse_attention.h"

#include <cstring>

#include "cpu/parallel_rows.h"
#include "cpu/thread_buffer.h"

#define DSV4_ROWS "cpu/sparse_attention_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
namespace {

constexpr int64_t kHeadsAtOnce = 32;  // two panels of AVX2, one of AVX-512

// Floats of AttentionScratch for any vector type.
int64_t scratch_of(int64_t heads, int64_t channels, int64_t tile) {
  const int64_t padded = heads + 16, row = channels + 48;
  return padded * channels + tile * row + tile * padded + padded * row + 3 * padded;
}

}  // namespace

KeyList::KeyList(const SparseAttention& call, int64_t token) : call_(&call), token_(token) {
  if (call.batch.sequences() == 0) {
    return;
  }
  sequence_ = call.batch.sequence_of(token);
  const int64_t position = call.batch.position_of(token, sequence_);
  first_ = std::max<int64_t>(position + 1 - call.window, 0);
  near_ = std::max<int64_t>(position + 1 - first_, 0);
  if (call.far.data != nullptr) {
    far_ = call.chooses ? call.chosen.columns
                        : std::min(visible_entries(position, call.ratio), call.far.capacity());
  }
}

int64_t KeyList::gather(int64_t place, const char** rows) const {
  int64_t count = 0;
  const auto add = [&](const char* row) {
    if (row != nullptr) {
      rows[count++] = row;
    }
  };
  const int64_t after = place + call_->tile;
  for (int64_t i = place; i < std::min(after, near_); ++i) {
    add(call_->near.row(sequence_, first_ + i));
  }
  const int64_t entry = call_->first_entry();
  for (int64_t i = std::max(place - entry, int64_t{0}); i < std::min(after - entry, far_); ++i) {
    add(call_->far.row(sequence_, call_->chooses ? call_->chosen.at(token_, i) : i));
  }
  return count;
}

int64_t KeyList::next(const char** rows) {
  const int64_t tile = call_->tile, entry = call_->first_entry();
  while (true) {
    if (place_ >= near_) {  // places without keys end the window
      place_ = std::max(place_, entry / tile * tile);
      if (place_ >= entry + far_) {
        return 0;
      }
    }
    const int64_t count = gather(place_, rows);
    place_ += tile;
    if (count > 0) {
      return count;
    }
  }
}

void sparse_attention(const SparseAttention& call, Isa isa) {
  if (call.tokens == 0) {
    return;
  }
  const int64_t groups = (call.heads + kHeadsAtOnce - 1) / kHeadsAtOnce;
  const int64_t keys = call.window + (call.chooses               ? call.chosen.columns
                                      : call.far.data != nullptr ? call.far.capacity()
                                                                 : 0);
  const int64_t products = std::min(call.heads, kHeadsAtOnce) * call.channels * 2 * (keys + 1);
  const auto attend = DSV4_FOR_ISA(isa, attend_heads);
  const int64_t grain = grain_of(kProductsPerThread, products);
  parallel_for(call.tokens * groups, grain, [&](int64_t begin, int64_t end) {
    thread_local ThreadBuffer buffer;
    while (begin < end) {  // as many groups of a token as there are, so that keys are widened once
      const int64_t token = begin / groups, first = begin % groups;
      const int64_t last = std::min(groups, first + end - begin);
      const int64_t heads = std::min(call.heads, last * kHeadsAtOnce) - first * kHeadsAtOnce;
      attend(call, token, first * kHeadsAtOnce, heads,
             buffer.of<float>(scratch_of(heads, call.channels, call.tile)));
      begin += last - first;
    }
  });
}

}  // namespace dsv4::cpu
