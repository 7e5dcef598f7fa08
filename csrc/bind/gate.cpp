#include "cpu/gate.h"

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

using Routed = std::tuple<at::Tensor, at::Tensor>;

// What the folded gates divide logits and scores by.
constexpr float kLogitUnit = 4096, kScoreUnit = 64;

WhyNot not_router(const at::Tensor& x, const at::Tensor& weight) {
  return first(not_float_rows("x", x), not_float_rows("weight", weight));
}

cpu::Gate gate_of(const at::Tensor& x, const at::Tensor& weight, int64_t k, double route_scale,
                  Routed& results) {
  auto& [weights, ids] = results;
  weights = new_tensor({x.size(0), k}, at::kFloat);
  ids = new_tensor({x.size(0), k}, at::kInt);
  return {.dtype = dtype_of(x),
          .x = x.const_data_ptr(),
          .x_rows = rows_of(x),
          .weight_dtype = dtype_of(weight),
          .weight = weight.const_data_ptr(),
          .experts = weight.size(0),
          .weight_stride = weight.stride(0),
          .unit = 1,
          .k = k,
          .route_scale = static_cast<float>(route_scale),
          .bias = nullptr,
          .bias_stride = 0,
          .bias_unit = 1,
          .tokens = {},
          .tokens_stride = 0,
          .table = {},
          .table_rows = 0,
          .table_strides = {},
          .weights = weights.mutable_data_ptr<float>(),
          .ids = ids.mutable_data_ptr<int32_t>()};
}

template <bool folded>
struct GateTopk {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& bias, int64_t, double) {
    return first(not_router(x, weight), not_single("bias", bias));
  }

  template <Isa isa>
  static Routed run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                    int64_t k, double route_scale) {
    Routed results;
    cpu::Gate call = gate_of(x, weight, k, route_scale, results);
    call.unit = folded ? kLogitUnit : 1;
    call.bias = bias.const_data_ptr<float>();
    call.bias_stride = bias.stride(0);
    call.bias_unit = folded ? kScoreUnit : 1;
    cpu::gate(call, isa);
    return results;
  }
};

template <bool folded>
struct GateHash {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor&, const at::Tensor&, double) {
    return not_router(x, weight);
  }

  template <Isa isa>
  static Routed run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& input_ids,
                    const at::Tensor& table, double route_scale) {
    Routed results;
    cpu::Gate call = gate_of(x, weight, table.size(1), route_scale, results);
    call.unit = folded ? kLogitUnit : 1;
    call.tokens = indices_of(input_ids);
    call.tokens_stride = input_ids.stride(0);
    call.table = indices_of(table);
    call.table_rows = table.size(0);
    call.table_strides[0] = table.stride(0);
    call.table_strides[1] = table.stride(1);
    cpu::gate(call, isa);
    return results;
  }
};

const IsaRegistration<GateTopk<false>> gate_topk("gate_topk");
const IsaRegistration<GateTopk<true>> gate_topk_folded("gate_topk_folded");
const IsaRegistration<GateHash<false>> gate_hash("gate_hash");
const IsaRegistration<GateHash<true>> gate_hash_folded("gate_hash_folded");

}  // namespace
}  // namespace dsv4::bind
