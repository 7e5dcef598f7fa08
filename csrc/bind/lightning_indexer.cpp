#include "cpu/lightning_indexer.h"

#include <algorithm>

#include "candidate.h"
#include "common/error.h"
#include "indexer_view.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

// Rows of codes with a scale each.
template <cpu::RowFormat format>
struct CodedIndexerKernel {
  static WhyNot why_not(const Context&, const at::Tensor& q, const at::Tensor&,
                        const at::Tensor& k_cache, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t,
                        int64_t) {
    return not_scored(q, k_cache);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& q, const at::Tensor& q_scale, const at::Tensor& k_cache,
                        const at::Tensor& k_scale, const at::Tensor& weights,
                        const at::Tensor& block_table, const at::Tensor& query_start_loc,
                        const at::Tensor& seq_lens, int64_t, int64_t ratio, int64_t k) {
    const at::Tensor chosen = new_tensor({q.size(0), k}, at::kInt);
    const auto bytes = static_cast<int64_t>(q_scale.element_size());
    cpu::lightning_indexer(
        {format,
         indexer_query(DType::f32, q, k_cache, weights, block_table, query_start_loc, seq_lens,
                       ratio),
         static_cast<const char*>(q_scale.const_data_ptr()), q_scale.stride(0) * bytes,
         q_scale.stride(1) * bytes, rows_of_pages(k_scale, block_table),
         block_table.size(1) * k_cache.size(1), k, chosen.mutable_data_ptr<int32_t>()},
        isa);
    return chosen;
  }
};

struct LightningIndexerKernel {
  static WhyNot why_not(const Context&, const at::Tensor& q, const at::Tensor& k_cache,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        int64_t, int64_t, int64_t) {
    return not_scored(q, k_cache);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& weights,
                        const at::Tensor& block_table, const at::Tensor& query_start_loc,
                        const at::Tensor& seq_lens, int64_t, int64_t ratio, int64_t k) {
    const at::Tensor chosen = new_tensor({q.size(0), k}, at::kInt);
    cpu::lightning_indexer({cpu::RowFormat::values,
                            indexer_query(dtype_of(q), q, k_cache, weights, block_table,
                                          query_start_loc, seq_lens, ratio),
                            nullptr, 0, 0, cpu::PagedRows{}, block_table.size(1) * k_cache.size(1),
                            k, chosen.mutable_data_ptr<int32_t>()},
                           isa);
    return chosen;
  }
};

// Scores of `indexer_scores`, choice of `topk_indices`.
struct IndexerTopKKernel {
  static WhyNot why_not(const Context&, const at::Tensor& q, const at::Tensor& k_cache,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        int64_t, int64_t) {
    return not_scored(q, k_cache);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& weights,
                        const at::Tensor& block_table, const at::Tensor& query_start_loc,
                        const at::Tensor& seq_lens, int64_t ratio, int64_t k) {
    const int64_t entries = block_table.size(1) * k_cache.size(1), columns = std::min(k, entries);
    at::Tensor chosen = new_tensor({q.size(0), columns}, at::kInt);
    auto* to = chosen.mutable_data_ptr<int32_t>();
    cpu::lightning_indexer({cpu::RowFormat::rounded,
                            indexer_query(dtype_of(q), q, k_cache, weights, block_table,
                                          query_start_loc, seq_lens, ratio),
                            nullptr, 0, 0, cpu::PagedRows{}, entries, columns, to},
                           isa);
    for (int64_t token = 0; columns > 0 && token < q.size(0); ++token) {
      if (to[token * columns] != cpu::kUndefined) {
        continue;
      }
      if (choice().check_contents) {
        throw ArgumentError("indexer_topk", "q", c10::str("NaN among the scores of token ", token),
                            "queries, keys and weights whose scores are numbers");
      }
      std::fill_n(to + token * columns, columns, -1);
    }
    return chosen;
  }
};

const IsaRegistration<IndexerTopKKernel> indexer_topk("indexer_topk");
const IsaRegistration<LightningIndexerKernel> lightning_indexer("lightning_indexer");
const IsaRegistration<CodedIndexerKernel<cpu::RowFormat::int8>> of_int8("lightning_indexer_int8");
const IsaRegistration<CodedIndexerKernel<cpu::RowFormat::e4m3>> of_e4m3("lightning_indexer_fp8");

}  // namespace
}  // namespace dsv4::bind
