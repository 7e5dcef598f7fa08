#include "cpu/compress_pool.h"

#include "candidate.h"
#include "paged_view.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

cpu::ProjectionWeight weight_of(const at::Tensor& weight) {
  const auto bytes = static_cast<int64_t>(weight.element_size());
  return {dtype_of(weight), static_cast<const char*>(weight.const_data_ptr()),
          weight.stride(0) * bytes};
}

struct CompressPoolKernel {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& wkv,
                        const at::Tensor& wgate, const at::Tensor& ape,
                        const at::Tensor& state_cache, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, int64_t, int64_t) {
    return first(not_float_rows("x", x), not_float_rows("wkv", wkv), not_float_rows("wgate", wgate),
                 not_float_rows("ape", ape), not_float_rows("state_cache", state_cache));
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const at::Tensor& wkv, const at::Tensor& wgate,
                        const at::Tensor& ape, const at::Tensor& state_cache,
                        const at::Tensor& state_block_table, const at::Tensor& query_start_loc,
                        const at::Tensor& seq_lens, int64_t, int64_t head_dim) {
    const int64_t tokens = x.size(0), ratio = ape.size(0);
    const int64_t rows = std::min(tokens, tokens / ratio + seq_lens.size(0));
    const at::Tensor entries = new_tensor({rows, head_dim}, x.scalar_type());
    cpu::compress_pool(
        {
            dtype_of(x),
            tokens,
            x.size(1),
            ape.size(1),
            head_dim,
            static_cast<const char*>(x.const_data_ptr()),
            x.stride(0) * static_cast<int64_t>(x.element_size()),
            weight_of(wkv),
            weight_of(wgate),
            ape.const_data_ptr<float>(),
            ape.stride(0),
            ratio,
            rows_of_pages(state_cache, state_block_table),
            batch_of(query_start_loc, seq_lens),
            static_cast<char*>(entries.mutable_data_ptr()),
            rows,
        },
        isa);
    return entries;
  }
};

const IsaRegistration<CompressPoolKernel> compress_pool("compress_pool");

}  // namespace
}  // namespace dsv4::bind
