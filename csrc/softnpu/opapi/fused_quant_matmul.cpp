// npu_quant_matmul: what it computes, by the formulas of hicann/ops-nn
// matmul/quant_batch_matmul_v4/docs/aclnnQuantMatmulV5.md.
#include "fused_quant_matmul.h"

#include <ATen/ops/matmul.h>
#include <ATen/ops/round.h>

namespace softnpu {
namespace {

at::Tensor values(In x) {
  switch (x.scalar_type()) {
    case kI32:
    case kI4:
      return int4_values(x);
    case kE2M1:
      return fp4_values(x);
    default:
      return x.to(kF32).to(at::kDouble);  // sums are exact for integers, and free of overflow
  }
}

at::Tensor spread(In scale, int64_t count, int64_t axis, int64_t size) {
  return scale.repeat_interleave(count, axis).slice(axis, 0, size);
}

bool is_packed(In scale) {
  return scale.scalar_type() == at::kLong || scale.scalar_type() == at::kUInt64;
}

at::Tensor scale_values(In scale) {
  if (!is_packed(scale)) return scale.to(kF32);
  return scale.contiguous().view(kF32).slice(-1, 0, std::nullopt,
                                             2);  // the low half; npu_trans_quant_param
}

at::Tensor grouped_product(const QuantMatmul& call) {
  at::Tensor a = values(call.x1), b = values(call.x2);
  const int64_t m = a.size(-2), k = a.size(-1), n = b.size(-1);
  at::Tensor s1 = call.x1_scale.to(kF32).to(at::kDouble),
             s2 = call.x2_scale.to(kF32).to(at::kDouble);
  if (call.x1_scale.scalar_type() == kE8M0) {
    s1 = spread(s1.flatten(-2), 32, -1, k);
    s2 = spread(s2.movedim(-1, -2).flatten(-3, -2), 32, -2, k);
  } else if (call.x2_offset.defined()) {
    b = b.sub(spread(call.x2_offset.to(at::kDouble), 256, -2, k));
    s2 = spread(s2, 256, -2, k);
  } else {
    s1 = spread(spread(s1, s1.size(-2) == m ? 1 : 128, -2, m), 128, -1, k);
    s2 = spread(spread(s2, 128, -2, k), 128, -1, n);
  }
  return at::matmul(a.mul(s1), b.mul(s2));
}

at::Tensor product(const QuantMatmul& call) {
  if (call.x1_scale.defined() && call.x1_scale.dim() >= 2 && call.x2_scale.dim() >= 2) {
    const at::Tensor y = grouped_product(call);
    return call.bias.defined() ? y.add(call.bias.to(at::kDouble)) : y;
  }
  const bool int32 = call.bias.defined() && call.bias.scalar_type() == kI32;
  at::Tensor sum = at::matmul(values(call.x1), values(call.x2));
  // A fp32 bias of a static FLOAT8 product is added before the scale, as an INT32 one.
  const bool before = int32 || (is_packed(call.x2_scale) && call.bias.defined());
  if (before) sum = sum.add(call.bias.to(at::kDouble));
  if (call.out->scalar_type() == kI32) return sum;
  at::Tensor y = sum.to(kF32).mul(scale_values(call.x2_scale));
  if (call.x1_scale.defined()) y = y.mul(call.x1_scale.unsqueeze(-1));
  if (call.bias.defined() && !before) y = y.add(call.bias.to(kF32));
  if (call.x2_offset.defined()) y = y.add(call.x2_offset);
  return y;
}

}  // namespace

void QuantMatmul::run() const {
  if (out->numel() == 0) return;
  const at::Tensor y = product(*this);
  out = out->scalar_type() == kI8 ? at::round(y).clamp(-128, 127) : y;
}

NAMED(aclnnQuantMatmulV5, QuantMatmul, all, check, run)

}  // namespace softnpu
