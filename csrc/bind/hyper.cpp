#include "cpu/hyper.h"

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

WhyNot not_streams(const at::Tensor& x) {
  if (x.size(1) < 1 || x.size(1) > cpu::kMostStreams) {
    return "x has " + std::to_string(x.size(1)) + " streams, and the kernel mixes 1 to " +
           std::to_string(cpu::kMostStreams);
  }
  return not_float_rows("x", x);
}

cpu::HyperMix mix_of(const at::Tensor& x, const at::Tensor& fn, const at::Tensor& base,
                     const at::Tensor& scale, double norm_eps, double hc_eps, const at::Tensor& y) {
  return {.dtype = dtype_of(x),
          .x = x.const_data_ptr(),
          .x_rows = rows_of(x),
          .streams = x.size(1),
          .fn = fn.const_data_ptr<float>(),
          .fn_stride = fn.stride(0),
          .base = base.const_data_ptr<float>(),
          .base_stride = base.stride(0),
          .scale = scale.const_data_ptr<float>(),
          .scale_stride = scale.stride(0),
          .rounds = 0,
          .norm_eps = static_cast<float>(norm_eps),
          .hc_eps = static_cast<float>(hc_eps),
          .y = y.mutable_data_ptr(),
          .post = nullptr,
          .comb = nullptr};
}

template <bool hf32>
struct HcPre {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& fn,
                        const at::Tensor& base, const at::Tensor& scale, int64_t, double, double) {
    return first(not_streams(x), not_float_rows("fn", fn), not_single("base", base),
                 not_single("scale", scale));
  }

  template <Isa isa>
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> run(const at::Tensor& x,
                                                            const at::Tensor& fn,
                                                            const at::Tensor& base,
                                                            const at::Tensor& scale, int64_t rounds,
                                                            double norm_eps, double hc_eps) {
    const int64_t tokens = x.size(0), n = x.size(1);
    at::Tensor y = new_tensor({tokens, x.size(2)}, x.scalar_type());
    at::Tensor post = new_tensor({tokens, n}, at::kFloat);
    at::Tensor comb = new_tensor({tokens, n, n}, at::kFloat);
    cpu::HyperMix call = mix_of(x, fn, base, scale, norm_eps, hc_eps, y);
    call.rounds = rounds;
    call.post = post.mutable_data_ptr<float>();
    call.comb = comb.mutable_data_ptr<float>();
    call.hf32 = hf32;
    cpu::hyper_mix(call, isa);
    return {std::move(y), std::move(post), std::move(comb)};
  }
};

template <bool hf32>
struct HcHead {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& fn,
                        const at::Tensor& base, const at::Tensor& scale, double, double) {
    return first(not_streams(x), not_float_rows("fn", fn), not_single("base", base),
                 not_single("scale", scale));
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const at::Tensor& fn, const at::Tensor& base,
                        const at::Tensor& scale, double norm_eps, double hc_eps) {
    at::Tensor y = new_tensor({x.size(0), x.size(2)}, x.scalar_type());
    cpu::HyperMix call = mix_of(x, fn, base, scale, norm_eps, hc_eps, y);
    call.hf32 = hf32;
    cpu::hyper_mix(call, isa);
    return y;
  }
};

struct HcPost {
  static WhyNot why_not(const Context&, const at::Tensor& z, const at::Tensor& x,
                        const at::Tensor& post, const at::Tensor& comb) {
    return first(not_streams(x), not_float_rows("z", z), not_single("post", post),
                 not_single("comb", comb));
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& z, const at::Tensor& x, const at::Tensor& post,
                        const at::Tensor& comb) {
    at::Tensor y = new_tensor(x.sizes(), x.scalar_type());
    cpu::hyper_post({dtype_of(x),
                     z.const_data_ptr(),
                     rows_of(z),
                     x.const_data_ptr(),
                     rows_of(x),
                     x.size(1),
                     post.const_data_ptr<float>(),
                     {post.stride(0), post.stride(1)},
                     comb.const_data_ptr<float>(),
                     {comb.stride(0), comb.stride(1), comb.stride(2)},
                     y.mutable_data_ptr()},
                    isa);
    return y;
  }
};

const IsaRegistration<HcPre<false>> hc_pre("hc_pre");
const IsaRegistration<HcPre<true>> hc_pre_hf32("hc_pre_hf32");
const IsaRegistration<HcHead<false>> hc_head("hc_head");
const IsaRegistration<HcHead<true>> hc_head_hf32("hc_head_hf32");
const IsaRegistration<HcPost> hc_post("hc_post");

}  // namespace
}  // namespace dsv4::bind
