// Rotation of some channels in place. Table: argument, its tensor, required, dtypes, ranks, source.
#include <ATen/ops/stack.h>

#include "fused_paged.h"

namespace softnpu {
namespace {

// docs/spec/ascend-operators.md 4.5: OT posembedding/inplace_partial_rotary_mul. Our reading: cos
// in x's dtype is widened and multiplied in fp32 too; an empty slice leaves cos and sin unread.
struct PartialRotary {
  Out x;
  at::Tensor cos, sin;
  int64_t mode;
  std::vector<int64_t> partial_slice;
  FIELDS(all, x, cos, sin, mode, partial_slice)

  int64_t first() const { return partial_slice[0]; }
  int64_t width() const { return partial_slice[1] - partial_slice[0]; }

  // Which axes of cos may be 1 where x's are not, by the page.
  void check_broadcast() const {
    const auto is = [&](int64_t b, int64_t s, int64_t n) {
      return cos.size(0) == b && cos.size(1) == s && cos.size(2) == n;
    };
    const int64_t b = x->size(0), s = x->size(1), n = x->size(2);
    if (on_a5())
      require(is(b, s, n) || is(b, 1, n) || is(b, 1, 1) || is(1, 1, 1), "cos", show(cos),
              "[B, S, N, d], [B, 1, N, d], [B, 1, 1, d] or [1, 1, 1, d]");
    else
      require(is(b, s, 1) || is(b, 1, 1), "cos", show(cos), "[B, S, 1, d] or [B, 1, 1, d]");
  }

  void check() const {
    require_family();
    check_table({{"x", *x, true, kFloats, 4, 4, kDocument},
                 {"cos", cos, true, kFloats, 4, 4, kDocument},
                 {"sin", sin, true, kFloats, 4, 4, kDocument}});
    require(mode == 1, "mode", text(mode), "1 (interleave)");
    const int64_t last = x->size(3);
    require(last % 2 == 0 && last <= 1024, "x", show(*x), "an even last dimension up to 1024");
    require(partial_slice.size() == 2 && first() >= 0 && width() >= 0 && partial_slice[1] <= last,
            "partial_slice", shown(partial_slice), "[start, end) of the last dimension");
    require(width() % 2 == 0, "partial_slice", shown(partial_slice), "an even width");
    require(cos.scalar_type() == x->scalar_type() || cos.scalar_type() == kF32, "cos", show(cos),
            "fp32, or the dtype of x");
    require(sin.scalar_type() == cos.scalar_type() && sin.sizes() == cos.sizes(), "sin", show(sin),
            "dtype and shape of cos");
    for (const auto& [tensor, name] : {std::pair(*x, "x"), {cos, "cos"}, {sin, "sin"}})
      paged::check_dense(tensor, name);
    if (width() == 0) return;
    require(cos.size(3) == width(), "cos", show(cos), "the width of partial_slice");
    check_broadcast();
  }

  void run() const {
    x.touch();
    if (width() == 0) return;
    const at::Tensor part = x->narrow(3, first(), width()), wide = part.to(kF32);
    const at::Tensor pairs = wide.unflatten(3, {width() / 2, 2});
    const at::Tensor turned = at::stack({pairs.select(-1, 1).neg(), pairs.select(-1, 0)}, -1);
    part.copy_(wide.mul(cos.to(kF32)).add(turned.flatten(-2).mul(sin.to(kF32))));
  }
};

}  // namespace

NAMED(aclnnInplacePartialRotaryMul, PartialRotary, all, check, run)

}  // namespace softnpu
