// The indexer's arguments as CPU kernels read them.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/indexer_scores.h"
#include "paged_view.h"
#include "tensor_view.h"

namespace dsv4::bind {

// What the kernels of scores do not read.
inline WhyNot not_scored(const at::Tensor& q, const at::Tensor& k_cache) {
  return first(not_float_rows("q", q), not_float_rows("k_cache", k_cache),
               q.size(1) > 0 && q.size(2) > 0
                   ? WhyNot()
                   : "q has no heads or channels, which only the reference scores");
}

// dtype: of q and of the keys, if they are values.
inline cpu::IndexerQuery indexer_query(DType dtype, const at::Tensor& q, const at::Tensor& k_cache,
                                       const at::Tensor& weights, const at::Tensor& block_table,
                                       const at::Tensor& query_start_loc,
                                       const at::Tensor& seq_lens, int64_t ratio) {
  const auto bytes = static_cast<int64_t>(q.element_size());
  const auto weight_bytes = static_cast<int64_t>(weights.element_size());
  return {
      dtype,
      q.size(0),
      q.size(1),
      q.size(2),
      static_cast<const char*>(q.const_data_ptr()),
      q.stride(0) * bytes,
      q.stride(1) * bytes,
      rows_of_pages(k_cache, block_table),
      batch_of(query_start_loc, seq_lens),
      ratio,
      static_cast<const char*>(weights.const_data_ptr()),
      weights.stride(0) * weight_bytes,
      weights.stride(1) * weight_bytes,
  };
}

}  // namespace dsv4::bind
