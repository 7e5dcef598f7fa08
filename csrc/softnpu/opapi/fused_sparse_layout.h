// How the sparse operators find their rows: BSND [B, S, N, D] with lengths, TND [T, N, D] with
// prefix sums, PA_BSND [blocks, block, N, D] through block_table.
#pragma once

#include "check.h"

namespace softnpu::sparse {

struct Layout {
  std::string query, key;
  at::Tensor query_lengths, key_lengths, blocks;  // undefined: not given
  const char* key_layout_name;
  const char* key_lengths_name;
};

// One sequence of the batch: rows of the flattened query, and its number of keys.
struct Sequence {
  int64_t batch, first_query, queries, padding, first_key, keys;

  // Keys that query i of the sequence may see: all, or (sparse_mode 3) up to the diagonal that ends
  // right down.
  int64_t visible(int64_t i, int64_t sparse_mode) const {
    return sparse_mode == 3 ? std::max<int64_t>(keys - queries + i + 1, 0) : keys;
  }
};

inline bool paged(const Layout& layout) { return layout.key == "PA_BSND"; }

// Ranks, batch sizes, one key head, block size; lengths and table where the layouts want them.
void check_layout(const Layout& layout, In query, In key);
void check_plain(In x, const char* name);  // contiguous
void check_cache(const Layout& layout, In x,
                 const char* name);  // the same; pages on A5 may be apart
void check_modes(int64_t sparse_mode, int64_t before, int64_t after);
void check_width(In x, const char* name, int64_t width, const char* expected);

// Reads the lengths: only in kernels. Throws when they do not fit the tensors.
std::vector<Sequence> sequences(const Layout& layout, In query, In key);
at::Tensor rows_of(const Layout& layout, In cache, const Sequence& sequence);  // [keys, D]

}  // namespace softnpu::sparse
