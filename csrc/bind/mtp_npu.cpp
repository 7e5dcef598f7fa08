#include <ATen/ops/empty.h>

#include "matmul_npu.h"
#include "npu/elementary.h"
#include "npu/embedding.h"
#include "npu/matmul.h"

namespace dsv4::bind {
namespace {

struct MtpCombine {
  static WhyNot why_not(const Context&, const at::Tensor& e, const at::Tensor& x) {
    return first(not_of("x", x, kFloats), not_of("e", e, {x.scalar_type()}), empty("x", x));
  }

  static at::Tensor run(const at::Tensor& e, const at::Tensor& x) {
    const at::Tensor of_each = e.unsqueeze(1);
    at::Tensor out = at::empty(x.sizes(), x.options());
    const NpuCall call("mtp_combine", x);
    call.launch(npu::Add{call.in(of_each), call.in(x), {1.0F}, call.out(out)});
    return out;
  }
};

// fp32 sums of the looked-up rows' products, added to the logits.
struct MarkovBias {
  static WhyNot why_not(const Context&, const at::Tensor& logits, const at::Tensor&,
                        const at::Tensor& w1, const at::Tensor& w2) {
    return first(not_of("logits", logits, {at::kFloat}), not_of("markov_w1", w1, kFloats),
                 not_of("markov_w2", w2, kFloats), empty("logits", logits), empty("markov_w1", w1));
  }

  static at::Tensor run(const at::Tensor& logits, const at::Tensor& previous, const at::Tensor& w1,
                        const at::Tensor& w2) {
    const at::Tensor rows = at::empty({previous.size(0), w1.size(1)}, w1.options());
    const NpuCall call("markov_bias", logits);
    call.launch(npu::Embedding{call.in(w1), call.in(previous), call.out(rows)});
    return product(call, rows, w2).add_(logits);
  }
};

const NpuRegistration<MtpCombine, npu::Add> mtp_combine("mtp_combine");
const NpuRegistration<MarkovBias, npu::Embedding, npu::Matmul> markov_bias("markov_bias");

}  // namespace
}  // namespace dsv4::bind
