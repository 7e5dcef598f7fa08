// Relations between values that are integers: offsets, lengths, block tables, slots, chosen
// entries.
#include <c10/util/StringUtil.h>

#include <algorithm>

#include "relation_call.h"
#include "words.h"

namespace dsv4::bind {
namespace {

// int32 or int64 [n] of any stride, or [rows, columns], read in place.
class Integers {
 public:
  explicit Integers(const at::Tensor& tensor)
      : data_(tensor.const_data_ptr()),
        wide_(tensor.scalar_type() == at::kLong),
        vector_(tensor.dim() == 1),
        rows_(vector_ ? 1 : tensor.size(0)),
        columns_(tensor.size(-1)),
        row_stride_(vector_ ? 0 : tensor.stride(0)),
        stride_(tensor.stride(-1)) {}

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t operator[](int64_t i) const { return read(i * stride_); }
  int64_t at(int64_t row, int64_t column) const {
    return read(row * row_stride_ + column * stride_);
  }

  // The first column of a row with a value outside [low, high), or columns().
  int64_t first_outside(int64_t row, int64_t low, int64_t high) const {
    return wide_ ? first_outside_in<int64_t>(row, low, high)
                 : first_outside_in<int32_t>(row, low, high);
  }

  std::string index_words(int64_t row, int64_t column) const {
    return vector_ ? std::to_string(column) : c10::str("[", row, ", ", column, "]");
  }

 private:
  int64_t read(int64_t element) const {
    return wide_ ? static_cast<const int64_t*>(data_)[element]
                 : static_cast<const int32_t*>(data_)[element];
  }

  template <class T>
  int64_t first_outside_in(int64_t row, int64_t low, int64_t high) const {
    const T* values = static_cast<const T*>(data_) + row * row_stride_;
    for (int64_t i = 0; i < columns_; ++i) {
      const int64_t value = values[i * stride_];
      if (value < low || value >= high) {
        return i;
      }
    }
    return columns_;
  }

  const void* data_;
  bool wide_;
  bool vector_;
  int64_t rows_;
  int64_t columns_;
  int64_t row_stride_;
  int64_t stride_;
};

int64_t narrow(Wide value) {
  return static_cast<int64_t>(std::clamp<Wide>(value, INT64_MIN, INT64_MAX));
}

int64_t number(const Call& call, size_t i) { return narrow(call.term(i).value_or(0)); }

struct Blocks {
  Integers table;
  int64_t num_blocks;
  int64_t block_size;

  int64_t columns() const { return table.columns(); }
};

Blocks blocks_of(const Call& call) {
  const at::Tensor& cache = call.tensor(1);
  return {Integers(call.tensor(0)), cache.size(0), cache.size(1)};
}

// Calls visit(sequence, new tokens, length) for every sequence that offsets, lengths and `rows`
// rows of a table have.
template <class Visit>
void each_sequence(const Integers& offsets, const Integers& lengths, int64_t rows, Visit visit) {
  const int64_t sequences = std::min({offsets.columns() - 1, lengths.columns(), rows});
  for (int64_t s = 0; s < sequences; ++s) {
    visit(s, narrow(Wide(offsets[s + 1]) - offsets[s]), lengths[s]);
  }
}

// Calls visit(sequence, token, position) for every token below `tokens`.
template <class Visit>
void each_token(const Integers& offsets, const Integers& lengths, int64_t rows, int64_t tokens,
                Visit visit) {
  each_sequence(offsets, lengths, rows, [&](int64_t s, int64_t, int64_t length) {
    const int64_t end = std::min(offsets[s + 1], tokens);
    for (int64_t t = std::max<int64_t>(offsets[s], 0); t < end; ++t) {
      visit(s, t, narrow(Wide(length) - offsets[s + 1] + t));
    }
  });
}

void check_rows(const Call& call, const Integers& values, int64_t row, int64_t low, int64_t high) {
  const int64_t column = values.first_outside(row, low, high);
  if (column < values.columns()) {
    call.reject(std::to_string(values.at(row, column)), values.index_words(row, column));
  }
}

void reject_repeated(const Call& call, std::vector<int64_t>& values) {
  std::sort(values.begin(), values.end());
  const auto repeated = std::adjacent_find(values.begin(), values.end());
  if (repeated != values.end()) {
    call.reject(std::to_string(*repeated));
  }
}

// A table's cell whose block is none of the cache's.
struct WrongCell {
  int64_t sequence = -1;
  int64_t column = 0;
};

// Blocks low .. high of a sequence stand in the table's columns, modulo their number; of the wrong
// ones the first column counts.
void find_wrong_cell(const Blocks& blocks, int64_t s, Wide low, Wide high, int64_t first_block,
                     WrongCell& wrong) {
  const Wide last = std::min(high, low + blocks.columns() - 1);
  for (Wide block = low; block <= last; ++block) {
    const int64_t remainder = narrow(block % blocks.columns());
    const int64_t column = remainder < 0 ? remainder + blocks.columns() : remainder;
    const int64_t value = blocks.table.at(s, column);
    const bool outside = value < first_block || value >= blocks.num_blocks;
    if (outside && (wrong.sequence < 0 || column < wrong.column)) {
      wrong = {s, column};
    }
  }
}

Wide floor_block(Wide index, int64_t block_size) {
  return index >= 0 ? index / block_size : -((block_size - 1 - index) / block_size);
}

}  // namespace

// Arguments: offsets, lengths. Term: tokens.
void check_batch(const Call& call) {
  const Integers offsets(call.tensor(0)), lengths(call.tensor(1));
  const int64_t sequences = lengths.columns(), tokens = number(call, 0);
  if (offsets.columns() != sequences + 1) {
    call.reject(0, c10::str(offsets.columns(), " offsets"), c10::str(sequences + 1, " (R + 1)"));
  }
  if (offsets[0] != 0 || offsets[sequences] != tokens) {
    call.reject(0, c10::str(offsets[0], " .. ", offsets[sequences]),
                c10::str("offsets from 0 to the number of tokens ", tokens));
  }
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t start = offsets[s], end = offsets[s + 1];
    if (end < start) {
      call.reject(0, c10::str(start, " then ", end, " at ", s), "offsets that never fall");
    }
    if (lengths[s] < end - start) {
      call.reject(1, c10::str(lengths[s], " at ", s),
                  c10::str("at least the ", end - start, " tokens of this call"));
    }
  }
}

// Arguments: table, cache, offsets, lengths. Terms: first index, index behind the last, first
// block.
void check_table(const Call& call) {
  const Blocks blocks = blocks_of(call);
  const int64_t first_block = number(call, 2);
  WrongCell wrong;
  each_sequence(
      Integers(call.tensor(2)), Integers(call.tensor(3)), blocks.table.rows(),
      [&](int64_t s, int64_t new_tokens, int64_t length) {
        call.set_sequence(new_tokens, length);
        const Wide first = call.term(0).value_or(0), after = call.term(1).value_or(0);
        if (after <= first) {
          return;
        }
        if (after - first > Wide(blocks.columns()) * blocks.block_size) {
          call.reject(
              0, c10::str(blocks.columns(), " columns of ", blocks.block_size, " rows"),
              c10::str("at least ", wide_words(after - first), ", to hold indices ",
                       wide_words(first), " to ", wide_words(after - 1), " of sequence ", s));
        }
        if (wrong.sequence < 0) {
          find_wrong_cell(blocks, s, floor_block(first, blocks.block_size),
                          floor_block(after - 1, blocks.block_size), first_block, wrong);
        }
      });
  if (wrong.sequence >= 0) {
    call.reject(0,
                c10::str(blocks.table.at(wrong.sequence, wrong.column), " at [", wrong.sequence,
                         ", ", wrong.column, "]"),
                c10::str(first_block, " to ", blocks.num_blocks - 1));
  }
}

// Arguments: the bound, lengths. Term: its value.
void check_bound(const Call& call) {
  const Integers lengths(call.tensor(1));
  const int64_t bound = number(call, 0);
  int64_t most = bound;
  for (int64_t s = 0; s < lengths.columns(); ++s) {
    most = std::max(most, lengths[s]);
  }
  if (most > bound) {
    call.reject(0, std::to_string(bound), c10::str("at least ", most, ", as in seq_lens"));
  }
}

// Argument: values. Terms: low, high; values are in [low, high).
void check_range(const Call& call) {
  const Integers values(call.tensor(0));
  const int64_t low = number(call, 0), high = number(call, 1);
  for (int64_t row = 0; row < values.rows(); ++row) {
    check_rows(call, values, row, low, high);
  }
}

// Arguments: a table, and which rows of it are looked up. Terms as of `range`.
void check_looked_up(const Call& call) {
  const Integers values(call.tensor(0)), rows(call.tensor(1));
  const int64_t low = number(call, 0), high = number(call, 1);
  for (int64_t i = 0; i < rows.columns(); ++i) {
    if (const int64_t row = rows[i]; row >= 0 && row < values.rows()) {
      check_rows(call, values, row, low, high);
    }
  }
}

// Arguments: values, a row of them per token; offsets, lengths. Terms as of `range`, at `position`.
void check_of_tokens(const Call& call) {
  const Integers values(call.tensor(0)), offsets(call.tensor(1)), lengths(call.tensor(2));
  each_token(offsets, lengths, INT64_MAX, values.rows(), [&](int64_t, int64_t t, int64_t position) {
    call.set_position(position);
    check_rows(call, values, t, number(call, 0), number(call, 1));
  });
}

// Argument: values [n], of which the negative ones say "none".
void check_distinct(const Call& call) {
  const Integers values(call.tensor(0));
  int64_t i = 0;
  for (int64_t last = -1; i < values.columns() && values[i] > last; ++i) {
    last = values[i];
  }
  if (i == values.columns()) {  // ascending, as slots mostly are
    return;
  }
  std::vector<int64_t> present;
  for (i = 0; i < values.columns(); ++i) {
    if (values[i] >= 0) {
      present.push_back(values[i]);
    }
  }
  reject_repeated(call, present);
}

// Arguments: table, cache, offsets, lengths: the cache rows of all tokens.
void check_distinct_rows(const Call& call) {
  const Blocks blocks = blocks_of(call);
  const Integers offsets(call.tensor(2)), lengths(call.tensor(3));
  if (blocks.columns() == 0 || blocks.block_size == 0) {
    return;
  }
  std::vector<int64_t> rows;
  each_token(offsets, lengths, blocks.table.rows(), INT64_MAX,
             [&](int64_t s, int64_t, int64_t position) {
               const int64_t index = std::max<int64_t>(position, 0);
               const int64_t column = index / blocks.block_size % blocks.columns();
               const Wide row =
                   Wide(blocks.table.at(s, column)) * blocks.block_size + index % blocks.block_size;
               rows.push_back(narrow(row));
             });
  reject_repeated(call, rows);
}

// Argument: offsets [n + 1]. Term: where they end.
void check_offsets(const Call& call) {
  const Integers offsets(call.tensor(0));
  const int64_t size = offsets.columns();
  bool fit = size > 0 && offsets[0] == 0 && offsets[size - 1] == number(call, 0);
  for (int64_t i = 1; fit && i < size; ++i) {
    fit = offsets[i - 1] <= offsets[i];
  }
  if (!fit) {
    std::string list;
    for (int64_t i = 0; i < size; ++i) {
      list += (i == 0 ? "" : ", ") + std::to_string(offsets[i]);
    }
    call.reject("[" + list + "]");
  }
}

// Argument: values [rows, columns], in which the negative ones stand behind the others.
void check_trailing(const Call& call) {
  const Integers values(call.tensor(0));
  for (int64_t row = 0; row < values.rows(); ++row) {
    for (int64_t i = 1; i < values.columns(); ++i) {
      if (values.at(row, i - 1) < 0 && values.at(row, i) >= 0) {
        call.reject(std::to_string(values.at(row, i - 1)), values.index_words(row, i - 1));
      }
    }
  }
}

}  // namespace dsv4::bind
