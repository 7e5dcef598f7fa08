#include "cpu/sparse_attention.h"

#include <optional>

#include "candidate.h"
#include "paged_view.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

struct SparseAttentionKernel {
  static WhyNot why_not(const Context&, const at::Tensor& q, const at::Tensor& sink,
                        const at::Tensor& window_cache, const at::Tensor&,
                        const Optional& cmp_cache, const Optional&, const Optional&,
                        const at::Tensor&, const at::Tensor&, int64_t, int64_t) {
    return first(not_float_rows("q", q), not_single("sink", sink),
                 not_float_rows("window_cache", window_cache),
                 cmp_cache ? not_float_rows("cmp_cache", *cmp_cache) : std::nullopt);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& q, const at::Tensor& sink, const at::Tensor& window_cache,
                        const at::Tensor& window_block_table, const Optional& cmp_cache,
                        const Optional& cmp_block_table, const Optional& cmp_indices,
                        const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                        int64_t window, int64_t ratio) {
    return attend<isa>(q, sink, window_cache, window_block_table, cmp_cache, cmp_block_table,
                       cmp_indices, query_start_loc, seq_lens, window, ratio, false);
  }

  template <Isa isa>
  static at::Tensor attend(const at::Tensor& q, const at::Tensor& sink,
                           const at::Tensor& window_cache, const at::Tensor& window_block_table,
                           const Optional& cmp_cache, const Optional& cmp_block_table,
                           const Optional& cmp_indices, const at::Tensor& query_start_loc,
                           const at::Tensor& seq_lens, int64_t window, int64_t ratio, bool ascend) {
    const at::Tensor out = like(q);
    const auto bytes = static_cast<int64_t>(q.element_size());
    cpu::SparseAttention call{
        dtype_of(q),
        q.size(0),
        q.size(1),
        q.size(2),
        static_cast<const char*>(q.const_data_ptr()),
        q.stride(0) * bytes,
        q.stride(1) * bytes,
        sink.const_data_ptr<float>(),
        sink.stride(0),
        rows_of_pages(window_cache, window_block_table),
        {},
        cmp_indices.has_value(),
        {},
        batch_of(query_start_loc, seq_lens),
        window,
        ratio,
        static_cast<char*>(out.mutable_data_ptr()),
        ascend ? cpu::kAscendTile : cpu::kKeyTile,
        ascend,
    };
    if (cmp_cache) call.far = rows_of_pages(*cmp_cache, *cmp_block_table);
    if (cmp_indices) call.chosen = integers_of(*cmp_indices);
    cpu::sparse_attention(call, isa);
    return out;
  }
};

struct SparseAttentionP512 {
  static WhyNot why_not(const Context& context, const at::Tensor& q, const at::Tensor& sink,
                        const at::Tensor& window_cache, const at::Tensor& window_block_table,
                        const Optional& cmp_cache, const Optional& cmp_block_table,
                        const Optional& cmp_indices, const at::Tensor& query_start_loc,
                        const at::Tensor& seq_lens, int64_t, int64_t window, int64_t ratio) {
    return SparseAttentionKernel::why_not(context, q, sink, window_cache, window_block_table,
                                          cmp_cache, cmp_block_table, cmp_indices, query_start_loc,
                                          seq_lens, window, ratio);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& q, const at::Tensor& sink, const at::Tensor& window_cache,
                        const at::Tensor& window_block_table, const Optional& cmp_cache,
                        const Optional& cmp_block_table, const Optional& cmp_indices,
                        const at::Tensor& query_start_loc, const at::Tensor& seq_lens, int64_t,
                        int64_t window, int64_t ratio) {
    return SparseAttentionKernel::attend<isa>(q, sink, window_cache, window_block_table, cmp_cache,
                                              cmp_block_table, cmp_indices, query_start_loc,
                                              seq_lens, window, ratio, true);
  }
};

const IsaRegistration<SparseAttentionKernel> sparse_attention("sparse_attention");
const IsaRegistration<SparseAttentionP512> sparse_attention_p512("sparse_attention_p512");

}  // namespace
}  // namespace dsv4::bind
