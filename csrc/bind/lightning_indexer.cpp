#include "cpu/lightning_indexer.h"

#include <ATen/EmptyTensor.h>

#include "candidate.h"
#include "indexer_view.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

struct LightningIndexerKernel {
  static WhyNot why_not(const Context&, const at::Tensor& q, const at::Tensor& k_cache,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        int64_t, int64_t, int64_t) {
    const WhyNot reason = not_float_rows("q", q);
    return reason ? reason : not_float_rows("k_cache", k_cache);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& weights,
                        const at::Tensor& block_table, const at::Tensor& query_start_loc,
                        const at::Tensor& seq_lens, int64_t, int64_t ratio, int64_t k) {
    at::Tensor chosen(at::detail::empty_cpu({q.size(0), k}, q.options().dtype(at::kInt)));
    cpu::lightning_indexer(
        {indexer_query(q, k_cache, weights, block_table, query_start_loc, seq_lens, ratio),
         block_table.size(1) * k_cache.size(1), k, chosen.mutable_data_ptr<int32_t>()},
        isa);
    return chosen;
  }
};

const IsaRegistration<LightningIndexerKernel> registration("lightning_indexer");

}  // namespace
}  // namespace dsv4::bind
