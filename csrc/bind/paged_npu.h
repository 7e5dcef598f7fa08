// Paged rows of one key head as chips take them.
#pragma once

#include <ATen/ops/div.h>
#include <ATen/ops/remainder.h>

#include "npu_call.h"
#include "step.h"

namespace dsv4::bind {

// [.., D] with an axis of one key head before its last.
inline at::Tensor one_head(const at::Tensor& x) { return x.unsqueeze(-2); }

// Whether the rows of each page lie behind each other; between pages may be gaps.
inline bool whole_pages(const at::Tensor& cache) {
  return cache.size(0) == 0 || cache.select(0, 0).is_contiguous();
}

// Why pages [pages, rows, ...] are none that a chip takes.
inline WhyNot not_pages(const char* name, const at::Tensor& cache, bool a5) {
  const int64_t rows = cache.size(1);
  if (!whole_pages(cache)) {
    return std::string(name) + " has gaps inside its pages, and the chip takes none";
  }
  if (rows > 1024 || (!a5 && rows % 16 != 0)) {
    return std::string(name) + " has pages that the chip does not take: 1024 rows at most, on A2 " +
           "and A3 a multiple of 16";
  }
  return {};
}

// Entries of each sequence, and tokens behind them: int32 [R] each.
struct EntryLengths {
  at::Tensor entries, residuals;

  EntryLengths(const at::Tensor& seq_lens, int64_t ratio) {
    const Tensors made = Step::once({"entry lengths", {seq_lens}, {ratio}}, [&] {
      return Tensors{at::div(seq_lens, ratio, "floor"), at::remainder(seq_lens, ratio)};
    });
    entries = made.at(0);
    residuals = made.at(1);
  }
};

}  // namespace dsv4::bind
