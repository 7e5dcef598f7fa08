#include "rotary_npu.h"

namespace dsv4::bind {
namespace {

WhyNot not_channels(const at::Tensor& x) {
  return first(not_of("x", x, kFloats), empty("x", x),
               unless(x.size(-1) % 2 == 0 && x.size(-1) <= kWidestRotated,
                      "the chip takes an even number of channels, up to 1024"));
}

struct Rope {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&, const at::Tensor&,
                        bool) {
    return not_channels(x);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& positions,
                        const at::Tensor& inv_freq, bool inverse) {
    const Rotation by(positions, inv_freq, inverse);
    at::Tensor out = x.clone(at::MemoryFormat::Contiguous);
    rotate(NpuCall("rope", x), out, by);
    return out;
  }
};

struct ApplyRope {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&, const at::Tensor&) {
    return first(not_channels(x), unless(x.is_contiguous(), "x has gaps, and the chip takes none"));
  }

  static void run(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
    rotate(NpuCall("apply_rope", x), x, Rotation(cos, sin));
  }
};

const NpuRegistration<Rope, npu::InplacePartialRotaryMul> rope("rope", Kind::composite);
const NpuRegistration<ApplyRope, npu::InplacePartialRotaryMul> apply_rope("apply_rope");

}  // namespace
}  // namespace dsv4::bind
