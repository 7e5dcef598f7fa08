#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "matmul_npu.h"
#include "npu/hyper.h"
#include "npu/matmul.h"

namespace dsv4::bind {
namespace {

WhyNot not_of_128(int64_t width) {
  return unless(width % 128 == 0 && width <= 100000,
                "the chip takes a multiple of 128 channels, up to 100000");
}

WhyNot not_four(const at::Tensor& x) {
  return unless(x.size(1) == npu::MhcPreSinkhorn::kStreams, "the chip takes 4 streams");
}

struct Post {
  static WhyNot why_not(const Context&, const at::Tensor& z, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor&) {
    return first(not_of("x", x, kHalves), not_of("z", z, {x.scalar_type()}), not_four(x),
                 not_of_128(x.size(2)));
  }

  static at::Tensor run(const at::Tensor& z, const at::Tensor& x, const at::Tensor& post,
                        const at::Tensor& comb) {
    at::Tensor out = at::empty(x.sizes(), x.options());
    if (out.numel() == 0) {
      return out;
    }
    const NpuCall call("hc_post", x);
    call.launch(
        npu::MhcPost{call.in(x), call.maybe(&comb), call.in(z), call.in(post), call.out(out)});
    return out;
  }
};

// What MhcPre takes, which multiplies in fp32.
WhyNot not_mixed(const at::Tensor& x) {
  const int64_t n = x.size(1), width = x.size(2);
  return first(not_of("x", x, kHalves),
               unless(n == 4 || n == 6 || n == 8, "the chip takes 4, 6 or 8 streams"),
               unless(width % 16 == 0 && width <= 16384,
                      "the chip takes a multiple of 16 channels, up to 16384"));
}

using Mixed = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// y [T, d], post [T, n] and the logits of comb [T, n, n], in fp32 but for y.
Mixed mixed(const NpuCall& call, const at::Tensor& x, const at::Tensor& fn, const at::Tensor& base,
            const at::Tensor& scale, double norm_eps, double hc_eps) {
  const int64_t tokens = x.size(0), n = x.size(1);
  const auto single = x.options().dtype(at::kFloat);
  at::Tensor y = at::empty({tokens, x.size(2)}, x.options());
  at::Tensor post = at::empty({tokens, n}, single), logits = at::empty({tokens, n, n}, single);
  if (tokens == 0) {
    return {y, post, logits};
  }
  call.launch(npu::MhcPre{call.in(x),
                          call.in(fn),
                          call.in(scale),
                          call.in(base),
                          {},
                          norm_eps,
                          hc_eps,
                          call.out(y),
                          call.out(post),
                          call.out(logits),
                          {},
                          {},
                          {}});
  return {y, post, logits};
}

// The exact fp32 route of two launches; the one-launch route multiplies in HF32.
struct Pre {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, int64_t rounds, double, double) {
    return first(not_mixed(x),
                 unless(rounds <= 100, "the chip does at most 100 rounds of Sinkhorn"));
  }

  static Mixed run(const at::Tensor& x, const at::Tensor& fn, const at::Tensor& base,
                   const at::Tensor& scale, int64_t rounds, double norm_eps, double hc_eps) {
    const NpuCall call("hc_pre", x);
    const auto [y, post, logits] = mixed(call, x, fn, base, scale, norm_eps, hc_eps);
    if (x.size(0) == 0) {
      return {y, post, logits};
    }
    at::Tensor comb = at::empty(logits.sizes(), logits.options());
    call.launch(npu::MhcSinkhorn{
        call.in(logits), static_cast<float>(hc_eps), rounds, call.out(comb), {}, {}});
    return {y, post, comb};
  }
};

// One launch for everything; 4 streams and 20 rounds are all it knows.
WhyNot not_fused(const Context& context, const at::Tensor& x) {
  const int64_t width = x.size(2);
  return first(not_of("x", x, kHalves), empty("x", x), not_four(x),
               on_a5(context)
                   ? unless(width == 4096 || width == 7168, "the chip takes 4096 or 7168 channels")
                   : not_of_128(width));
}

Mixed mix(const char* op, const at::Tensor& x, const at::Tensor& fn, const at::Tensor& base,
          const at::Tensor& scale, double norm_eps, double hc_eps) {
  const int64_t tokens = x.size(0), n = x.size(1);
  const auto single = x.options().dtype(at::kFloat);
  at::Tensor y = at::empty({1, tokens, x.size(2)}, x.options());
  at::Tensor post = at::empty({1, tokens, n}, single), comb = at::empty({1, tokens, n * n}, single);
  const NpuCall call(op, x);
  call.launch(npu::MhcPreSinkhorn{call.in(x.contiguous().unsqueeze(0)),
                                  call.in(fn.contiguous()),
                                  call.in(scale.contiguous()),
                                  call.in(base.contiguous()),
                                  n,
                                  npu::MhcPreSinkhorn::kRounds,
                                  hc_eps,
                                  norm_eps,
                                  false,
                                  call.out(y),
                                  call.out(post),
                                  call.out(comb),
                                  {},
                                  {},
                                  {},
                                  {},
                                  {}});
  return {y.squeeze(0), post.squeeze(0), comb.view({tokens, n, n})};
}

struct PreHf32 {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, int64_t rounds, double, double) {
    return first(not_fused(context, x), unless(rounds == npu::MhcPreSinkhorn::kRounds,
                                               "the chip does 20 rounds of Sinkhorn"));
  }

  static Mixed run(const at::Tensor& x, const at::Tensor& fn, const at::Tensor& base,
                   const at::Tensor& scale, int64_t, double norm_eps, double hc_eps) {
    return mix("hc_pre_hf32", x, fn, base, scale, norm_eps, hc_eps);
  }
};

// Rows of fn, base and scale for pre, post and comb. Those of pre are the head's, the others 0 and
// their results thrown away.
struct Padded {
  at::Tensor phi, bias, alpha;

  Padded(const at::Tensor& fn, const at::Tensor& base, const at::Tensor& scale) {
    const int64_t n = fn.size(0), rows = n * (n + 2);
    phi = at::zeros({rows, fn.size(1)}, fn.options());
    bias = at::zeros({rows}, base.options());
    alpha = at::zeros({3}, scale.options());
    phi.narrow(0, 0, n).copy_(fn);
    bias.narrow(0, 0, n).copy_(base);
    alpha.narrow(0, 0, 1).copy_(scale);
  }
};

struct HeadHf32 {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, double, double) {
    return not_fused(context, x);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& fn, const at::Tensor& base,
                        const at::Tensor& scale, double norm_eps, double hc_eps) {
    const Padded padded(fn, base, scale);
    return std::get<0>(
        mix("hc_head_hf32", x, padded.phi, padded.bias, padded.alpha, norm_eps, hc_eps));
  }
};

struct Head {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, double, double) {
    return first(not_mixed(x), empty("x", x));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& fn, const at::Tensor& base,
                        const at::Tensor& scale, double norm_eps, double hc_eps) {
    const Padded padded(fn, base, scale);
    const NpuCall call("hc_head", x);
    return std::get<0>(mixed(call, x, padded.phi, padded.bias, padded.alpha, norm_eps, hc_eps));
  }
};

// Step by step in fp32, where no one function multiplies so.
struct WideHead {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, double, double) {
    return first(not_of("x", x, kFloats), empty("x", x));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& fn, const at::Tensor& base,
                        const at::Tensor& scale, double norm_eps, double hc_eps) {
    const at::Tensor wide = x.to(at::kFloat), flat = wide.flatten(1);
    const at::Tensor length = flat.square().mean({-1}, true).add(norm_eps).rsqrt();
    const at::Tensor mixes = single_product(NpuCall("hc_head", x), flat, fn).mul(length);
    const at::Tensor pre = mixes.mul(scale).add(base).sigmoid().add(hc_eps);
    return wide.mul(pre.unsqueeze(-1)).sum({1}).to(x.scalar_type());
  }
};

const NpuRegistration<Post, npu::MhcPost> hc_post("hc_post");
const NpuRegistration<Pre, npu::MhcPre, npu::MhcSinkhorn> hc_pre("hc_pre");
const NpuRegistration<PreHf32, npu::MhcPreSinkhorn> hc_pre_hf32("hc_pre_hf32");
const NpuRegistration<HeadHf32, npu::MhcPreSinkhorn> hc_head_hf32("hc_head_hf32", Kind::composite);
const NpuRegistration<Head, npu::MhcPre> hc_head("hc_head", Kind::composite);
const NpuRegistration<WideHead, npu::Matmul> wide_hc_head("hc_head", Kind::composite);

}  // namespace
}  // namespace dsv4::bind
