#include "npu/rope.h"
#include "npu_call.h"

namespace dsv4::bind {
namespace {

constexpr int64_t kWidest = 1024;

// [T, F] as [T, 1, 1, 2F], every value twice.
at::Tensor for_pairs(const at::Tensor& values) {
  return values.repeat_interleave(2, -1).view({values.size(0), 1, 1, -1});
}

struct Rope {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&, const at::Tensor&,
                        bool) {
    return first(not_of("x", x, kFloats), empty("x", x),
                 unless(x.size(-1) % 2 == 0 && x.size(-1) <= kWidest,
                        "the chip takes an even number of channels, up to 1024"));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& positions,
                        const at::Tensor& inv_freq, bool inverse) {
    const at::Tensor angles = positions.to(at::kFloat).unsqueeze(-1).mul(inv_freq);
    const at::Tensor cos = for_pairs(angles.cos());
    const at::Tensor sin = for_pairs(inverse ? angles.sin().neg() : angles.sin());
    const int64_t width = x.size(-1);
    at::Tensor out = x.clone(at::MemoryFormat::Contiguous);
    const at::Tensor rows = out.view({x.size(0), 1, -1, width});
    const NpuCall call("rope", x);
    call.launch(npu::InplacePartialRotaryMul{call.out(rows),
                                             call.in(cos),
                                             call.in(sin),
                                             npu::InplacePartialRotaryMul::kInterleaved,
                                             {{width - cos.size(-1), width}}});
    return out;
  }
};

const NpuRegistration<Rope, npu::InplacePartialRotaryMul> rope("rope");

}  // namespace
}  // namespace dsv4::bind
