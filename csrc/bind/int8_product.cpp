#include "cpu/int8_product.h"

#include <array>

#include "candidate.h"
#include "int8_view.h"

namespace dsv4::bind {
namespace {

struct Int8Gemm {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& x_scale,
                        const at::Tensor& weight, const at::Tensor& weight_scale) {
    return first(not_int8_rows("x", x, x_scale), not_int8_rows("weight", weight, weight_scale));
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale) {
    at::Tensor y = new_tensor({x.size(0), weight.size(0)}, at::kBFloat16);
    const std::array<int32_t, 2> offsets{0, static_cast<int32_t>(x.size(0))};
    cpu::int8_product({.rows = x.size(0),
                       .n = weight.size(0),
                       .k = x.size(1),
                       .x = int8_rows(x, &x_scale),
                       .weight = int8_weight(weight, &weight_scale),
                       .offsets = offsets.data(),
                       .experts = 1,
                       .sums = nullptr,
                       .scaled = static_cast<BFloat16*>(y.mutable_data_ptr())},
                      isa);
    return y;
  }
};

struct Int8GroupedGemm {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& x_scale,
                        const at::Tensor& weight, const at::Tensor& weight_scale,
                        const at::Tensor& offsets) {
    return first(not_int8_rows("x", x, x_scale), not_int8_rows("weight", weight, weight_scale),
                 not_offsets(offsets));
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale, const at::Tensor& offsets) {
    at::Tensor y = new_tensor({x.size(0), weight.size(1)}, at::kBFloat16);
    cpu::int8_product({.rows = x.size(0),
                       .n = weight.size(1),
                       .k = x.size(1),
                       .x = int8_rows(x, &x_scale),
                       .weight = int8_weight(weight, &weight_scale),
                       .offsets = offsets.const_data_ptr<int32_t>(),
                       .experts = weight.size(0),
                       .sums = nullptr,
                       .scaled = static_cast<BFloat16*>(y.mutable_data_ptr())},
                      isa);
    return y;
  }
};

struct Int8GroupedSum {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& offsets) {
    return first(not_adjacent_elements("x", x), not_adjacent_elements("weight", weight),
                 not_offsets(offsets));
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
    at::Tensor y = new_tensor({x.size(0), weight.size(1)}, at::kInt);
    cpu::int8_product({.rows = x.size(0),
                       .n = weight.size(1),
                       .k = x.size(1),
                       .x = int8_rows(x, nullptr),
                       .weight = int8_weight(weight, nullptr),
                       .offsets = offsets.const_data_ptr<int32_t>(),
                       .experts = weight.size(0),
                       .sums = y.mutable_data_ptr<int32_t>(),
                       .scaled = nullptr},
                      isa);
    return y;
  }
};

const IsaRegistration<Int8Gemm> int8_gemm("int8_gemm");
const IsaRegistration<Int8GroupedGemm> int8_grouped_gemm("int8_grouped_gemm");
const IsaRegistration<Int8GroupedSum> int8_grouped_sum("int8_grouped_sum");

}  // namespace
}  // namespace dsv4::bind
