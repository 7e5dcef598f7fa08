// How the operators of CANN 9.1's V4 family find their rows: queries TND [T, N, D] with
// cu_seqlens [B + 1] or BSND, keys PA_BBND [pages, rows, 1, D] through a block table, or in the
// layout of the queries. Lengths count what is there after this step.
#pragma once

#include "fused_family.h"

namespace softnpu::paged {

inline const Types kLengths = {at::kInt};

inline bool given(In x) { return x.defined() && x.numel() > 0; }  // an empty tensor is none

// Rows of a sequence: of the flattened queries, or of keys that are not paged.
struct Span {
  int64_t first, count, padding;
};

// One side of a call. Its names are those of the operator's arguments.
struct Side {
  std::string layout;
  at::Tensor x, cu_seqlens, seqused, block_table;
  const char *name = "", *cu_seqlens_name = "", *seqused_name = "", *block_table_name = "",
             *layout_name = "";
};

// A pair of layouts, ranks, and who needs which lengths. `batch`: of the queries.
void check_queries(const Side& side, bool takes_seqused);
void check_keys(const Side& side, const std::string& layout_q, int64_t batch);
int64_t batch_size(const Side& queries);
void check_dense(In x, const char* name);     // contiguous
void check_pages(In pool, const char* name);  // contiguous but for the stride of its pages
// Rows of a page: on A2 and A3 a multiple of 16 up to 1024, on A5 1 to 1024.
void check_page_size(In pool, const char* name);

// Below: only in kernels.
std::vector<int64_t> values_of(In x);
std::vector<Span> spans(const Side& side, int64_t batch);

struct Places {
  at::Tensor pages, rows;
};
// Where positions of a sequence stand; a kernel fault when the table does not cover one, or names a
// page that the pool does not have.
struct Keys {
  Keys(const Side& side, int64_t batch);
  Places places(int64_t b, const std::vector<int64_t>& positions) const;
  int64_t count(int64_t b) const { return spans[static_cast<size_t>(b)].count; }

  Side side;
  at::Tensor pool;  // [pages, rows, ...]
  std::vector<Span> spans;

 private:
  std::vector<std::vector<int64_t>> table_;
};

// Flat slots page * rows + row for a writer: -1 stores nothing, another negative one, one behind
// the pool, and one that is named twice are kernel faults.
std::vector<int64_t> slots_of(In mapping, int64_t limit, const char* argument);

[[noreturn]] void fault(const char* argument, const std::string& what);
std::vector<int64_t> range(int64_t first, int64_t end);

}  // namespace softnpu::paged
