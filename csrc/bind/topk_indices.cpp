#include "candidate.h"
#include "cpu/topk.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

struct TopKKernel {
  static WhyNot why_not(const Context&, const at::Tensor& scores, const at::Tensor&, int64_t) {
    return not_float_rows("scores", scores);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& scores, const at::Tensor& visible, int64_t k) {
    const int64_t rows = scores.size(0), n = scores.size(1), chosen = std::min(k, n);
    at::Tensor best = new_tensor({rows, chosen}, at::kInt);
    cpu::topk({dtype_of(scores), rows, n, scores.const_data_ptr(), scores.stride(0),
               indices_of(visible), visible.stride(0), chosen, best.mutable_data_ptr<int32_t>()},
              isa);
    return best;
  }
};

const IsaRegistration<TopKKernel> topk_indices("topk_indices");

}  // namespace
}  // namespace dsv4::bind
