// Ragged batches and paged caches (dsv4_backend/ragged.py): where the rows of a sequence are. No
// value of a table, an offset or a length makes these functions leave the memory they are given.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dsv4::cpu {

// Integers [rows, columns], or [columns] as one row; strides in elements.
struct Int32Matrix {
  const int32_t* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;

  int64_t at(int64_t row, int64_t column) const {
    return data[row * row_stride + column * column_stride];
  }
};

// Sequence s owns tokens starts[s] .. starts[s + 1] - 1, the last of its lengths[s].
struct Batch {
  Int32Matrix starts;   // [R + 1]
  Int32Matrix lengths;  // [R]

  int64_t sequences() const { return lengths.columns; }
  int64_t start(int64_t s) const { return starts.at(0, s); }
  int64_t length(int64_t s) const { return lengths.at(0, s); }
  int64_t tokens(int64_t s) const { return start(s + 1) - start(s); }

  // The first sequence that ends behind a token, or the last one; there must be one.
  int64_t sequence_of(int64_t token) const {
    int64_t low = 0, high = sequences() - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (start(middle + 1) > token) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  int64_t position_of(int64_t token, int64_t s) const { return length(s) - start(s + 1) + token; }
};

// Compressed entries that a token at `position` sees.
inline int64_t visible_entries(int64_t position, int64_t ratio) {
  return position < 0 ? 0 : (position + 1) / ratio;
}

// The rows of a paged cache; strides in bytes. Without data there is none.
struct PagedRows {
  char* data = nullptr;
  int64_t num_blocks = 0;
  int64_t block_size = 1;
  int64_t block_stride = 0;
  int64_t row_stride = 0;
  Int32Matrix table;  // [R, columns]

  int64_t capacity() const { return table.columns * block_size; }

  // Row `index` of a sequence, or null: of a negative index, or where the table has no block.
  char* row(int64_t s, int64_t index) const {
    if (index < 0) {
      return nullptr;
    }
    const int64_t page = index / block_size;
    const int64_t block = table.at(s, page < table.columns ? page : page % table.columns);
    if (block < 0 || block >= num_blocks) {
      return nullptr;
    }
    return data + block * block_stride + (index - page * block_size) * row_stride;
  }
};

}  // namespace dsv4::cpu
