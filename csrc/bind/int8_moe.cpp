#include "cpu/int8_moe.h"

#include "candidate.h"
#include "cpu/int8_swiglu.h"
#include "int8_view.h"

namespace dsv4::bind {
namespace {

struct Int8SwigluQuantKernel {
  static WhyNot why_not(const Context&, const at::Tensor& sums, const at::Tensor& weight_scale,
                        const at::Tensor& x_scale, const at::Tensor& offsets, double) {
    return first(not_adjacent_elements("sums", sums), not_float_rows("weight_scale", weight_scale),
                 not_single("x_scale", x_scale), not_offsets(offsets));
  }

  template <Isa isa>
  static std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& sums,
                                                const at::Tensor& weight_scale,
                                                const at::Tensor& x_scale,
                                                const at::Tensor& offsets, double limit) {
    const int64_t rows = sums.size(0), width = sums.size(1) / 2;
    at::Tensor codes = new_tensor({rows, width}, at::kChar);
    at::Tensor scales = new_tensor({rows}, at::kFloat);
    cpu::int8_swiglu_quant({.rows = rows,
                            .width = width,
                            .sums = sums.const_data_ptr<int32_t>(),
                            .sums_stride = sums.stride(0),
                            .weight_scale = weight_scale.const_data_ptr<float>(),
                            .weight_scale_stride = weight_scale.stride(0),
                            .x_scale = x_scale.const_data_ptr<float>(),
                            .x_scale_stride = x_scale.stride(0),
                            .offsets = offsets.const_data_ptr<int32_t>(),
                            .experts = weight_scale.size(0),
                            .limit = static_cast<float>(limit),
                            .codes = codes.mutable_data_ptr<int8_t>(),
                            .scales = scales.mutable_data_ptr<float>()},
                           isa);
    return {std::move(codes), std::move(scales)};
  }
};

struct Int8MoeKernel {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weights,
                        const at::Tensor&, const at::Tensor& w13, const at::Tensor& w13_scale,
                        const at::Tensor& w2, const at::Tensor&, const at::Tensor& shared_w13,
                        const at::Tensor& shared_w13_scale, const at::Tensor& shared_w2,
                        const at::Tensor& shared_w2_scale, double) {
    return first(not_float_rows("x", x), not_single("weights", weights),
                 not_adjacent_elements("w13", w13), not_float_rows("w13_scale", w13_scale),
                 not_adjacent_elements("w2", w2), not_adjacent_elements("shared_w13", shared_w13),
                 not_float_rows("shared_w13_scale", shared_w13_scale),
                 not_adjacent_elements("shared_w2", shared_w2),
                 not_single("shared_w2_scale", shared_w2_scale));
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& ids,
                        const at::Tensor& w13, const at::Tensor& w13_scale, const at::Tensor& w2,
                        const at::Tensor& w2_scale, const at::Tensor& shared_w13,
                        const at::Tensor& shared_w13_scale, const at::Tensor& shared_w2,
                        const at::Tensor& shared_w2_scale, double limit) {
    at::Tensor y = like(x);
    cpu::int8_moe({.x = static_cast<const BFloat16*>(x.const_data_ptr()),
                   .x_rows = rows_of(x),
                   .choices = ids.size(1),
                   .weights = weights.const_data_ptr<float>(),
                   .weights_strides = {weights.stride(0), weights.stride(1)},
                   .ids = indices_of(ids),
                   .ids_strides = {ids.stride(0), ids.stride(1)},
                   .experts = w13.size(0),
                   .width = w2.size(2),
                   .routed = {int8_weight(w13, &w13_scale), int8_weight(w2, &w2_scale)},
                   .shared = {int8_weight(shared_w13, &shared_w13_scale),
                              int8_weight(shared_w2, &shared_w2_scale)},
                   .limit = static_cast<float>(limit),
                   .y = static_cast<BFloat16*>(y.mutable_data_ptr())},
                  isa);
    return y;
  }
};

const IsaRegistration<Int8SwigluQuantKernel> int8_swiglu_quant("int8_swiglu_quant");
const IsaRegistration<Int8MoeKernel> int8_moe("int8_moe");

}  // namespace
}  // namespace dsv4::bind
