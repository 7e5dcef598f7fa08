#include "cpu/indexer_prolog.h"

#include "candidate.h"
#include "int8_view.h"

namespace dsv4::bind {
namespace {

cpu::BFloat16Rows bf16_rows(const at::Tensor& rows) {
  return {static_cast<const BFloat16*>(rows.const_data_ptr()), rows.size(0), rows.stride(0)};
}

cpu::Angles angles(const at::Tensor& cos, const at::Tensor& sin) {
  return {cos.const_data_ptr<float>(), cos.stride(0), sin.const_data_ptr<float>(), sin.stride(0)};
}

struct IndexerPrologInt8 {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& qr,
                        const at::Tensor& qr_scale, const at::Tensor& wq_b,
                        const at::Tensor& wq_b_scale, const at::Tensor& weights_proj,
                        const at::Tensor& pooled, const at::Tensor& k_norm, double,
                        const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& entry_cos,
                        const at::Tensor& entry_sin, const at::Tensor& cache, const at::Tensor&,
                        int64_t) {
    return first(not_float_rows("x", x), not_int8_rows("qr", qr, qr_scale),
                 not_int8_rows("wq_b", wq_b, wq_b_scale),
                 not_float_rows("weights_proj", weights_proj), not_float_rows("pooled", pooled),
                 not_float_rows("k_norm", k_norm), not_float_rows("cos", cos),
                 not_float_rows("sin", sin), not_float_rows("entry_cos", entry_cos),
                 not_float_rows("entry_sin", entry_sin), not_adjacent_elements("cache", cache));
  }

  template <Isa isa>
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> run(
      const at::Tensor& x, const at::Tensor& qr, const at::Tensor& qr_scale, const at::Tensor& wq_b,
      const at::Tensor& wq_b_scale, const at::Tensor& weights_proj, const at::Tensor& pooled,
      const at::Tensor& k_norm, double eps, const at::Tensor& cos, const at::Tensor& sin,
      const at::Tensor& entry_cos, const at::Tensor& entry_sin, const at::Tensor& cache,
      const at::Tensor& slots, int64_t block_size) {
    const int64_t tokens = x.size(0), heads = weights_proj.size(0), channels = pooled.size(1);
    at::Tensor q = new_tensor({tokens, heads, channels}, at::kChar);
    at::Tensor q_scale = new_tensor({tokens, heads}, at::kHalf);
    at::Tensor weights = new_tensor({tokens, heads}, at::kHalf);
    cpu::indexer_prolog(
        {.x = bf16_rows(x),
         .width = x.size(1),
         .qr = int8_rows(qr, &qr_scale),
         .wq_b = int8_weight(wq_b, &wq_b_scale),
         .k = qr.size(1),
         .weights_proj = bf16_rows(weights_proj),
         .pooled = bf16_rows(pooled),
         .k_norm = static_cast<const BFloat16*>(k_norm.const_data_ptr()),
         .eps = static_cast<float>(eps),
         .channels = channels,
         .turned = cos.size(1),
         .of_tokens = angles(cos, sin),
         .of_entries = angles(entry_cos, entry_sin),
         .keys = {cpu::layout_keys(cpu::RowCodec::token_int8, channels, block_size),
                  static_cast<uint8_t*>(cache.mutable_data_ptr()), cache.size(0), cache.stride(0),
                  slots.const_data_ptr<int64_t>(), slots.stride(0), slots.size(0)},
         .q = q.mutable_data_ptr<int8_t>(),
         .q_scale = static_cast<Half*>(q_scale.mutable_data_ptr()),
         .weights = static_cast<Half*>(weights.mutable_data_ptr())},
        isa);
    return {std::move(q), std::move(q_scale), std::move(weights)};
  }
};

const IsaRegistration<IndexerPrologInt8> indexer_prolog_int8("indexer_prolog_int8");

}  // namespace
}  // namespace dsv4::bind
