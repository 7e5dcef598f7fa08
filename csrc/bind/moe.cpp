#include "cpu/moe.h"

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

struct MoeDispatchKernel {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&, int64_t) {
    return not_adjacent_rows("x", x);
  }

  template <Isa isa>
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> run(const at::Tensor& x,
                                                            const at::Tensor& ids,
                                                            int64_t num_experts) {
    const int64_t chosen = ids.numel();
    c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
    sizes[0] = chosen;
    at::Tensor rows = new_tensor(sizes, x.scalar_type());
    at::Tensor offsets = new_tensor({num_experts + 1}, at::kInt);
    at::Tensor order = new_tensor({chosen}, at::kInt);
    const auto item = static_cast<int64_t>(x.element_size());
    cpu::moe_dispatch({static_cast<const char*>(x.const_data_ptr()),
                       c10::multiply_integers(x.sizes().slice(1)) * item,
                       x.stride(0) * item,
                       indices_of(ids),
                       ids.size(0),
                       ids.size(1),
                       {ids.stride(0), ids.stride(1)},
                       num_experts,
                       static_cast<char*>(rows.mutable_data_ptr()),
                       offsets.mutable_data_ptr<int32_t>(),
                       order.mutable_data_ptr<int32_t>()});
    return {std::move(rows), std::move(offsets), std::move(order)};
  }
};

struct MoeCombineKernel {
  static WhyNot why_not(const Context&, const at::Tensor& y, const at::Tensor&, int64_t) {
    return not_float_rows("y", y);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& y, const at::Tensor& order, int64_t k) {
    at::Tensor sums = new_tensor({y.size(0) / k, y.size(1)}, at::kFloat);
    cpu::moe_combine({dtype_of(y), y.const_data_ptr(), rows_of(y), indices_of(order),
                      order.stride(0), k, nullptr, sums.mutable_data_ptr<float>()},
                     isa);
    return sums;
  }
};

const IsaRegistration<MoeDispatchKernel> moe_dispatch("moe_dispatch");
const IsaRegistration<MoeCombineKernel> moe_combine("moe_combine");

}  // namespace
}  // namespace dsv4::bind
