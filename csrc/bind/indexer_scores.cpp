#include "cpu/indexer_scores.h"

#include "candidate.h"
#include "indexer_view.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

struct IndexerScoresKernel {
  static WhyNot why_not(const Context&, const at::Tensor& q, const at::Tensor& k_cache,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        int64_t) {
    return not_scored(q, k_cache);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& weights,
                        const at::Tensor& block_table, const at::Tensor& query_start_loc,
                        const at::Tensor& seq_lens, int64_t ratio) {
    const int64_t entries = block_table.size(1) * k_cache.size(1);
    at::Tensor scores = new_tensor({q.size(0), entries}, q.scalar_type());
    cpu::indexer_scores({indexer_query(dtype_of(q), q, k_cache, weights, block_table,
                                       query_start_loc, seq_lens, ratio),
                         entries, static_cast<char*>(scores.mutable_data_ptr())},
                        isa);
    return scores;
  }
};

const IsaRegistration<IndexerScoresKernel> indexer_scores("indexer_scores");

}  // namespace
}  // namespace dsv4::bind
