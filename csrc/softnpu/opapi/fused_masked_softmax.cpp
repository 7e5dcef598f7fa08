// Softmax of window attention. Document: hicann/ops-nn norm/masked_softmax_with_rel_pos_bias/docs/
// aclnnMaskedSoftmaxWithRelPosBias.md. Table: argument, its tensor, required, dtypes, ranks,
// source.
#include <ATen/ops/softmax.h>

#include "check.h"

namespace softnpu {
namespace {

struct WindowSoftmax {
  at::Tensor x, mask, bias;
  double scale;
  int64_t precision;
  Out out;
  FIELDS(all, x, mask, bias, scale, precision, out)

  // [B, W, N, S1, S2], whatever the rank of x says.
  at::Tensor windows() const { return x.dim() == 5 ? x : x.unflatten(0, {-1, count()}); }
  int64_t count() const {
    if (x.dim() == 5) return x.size(1);
    return mask.defined() ? mask.size(mask.dim() == 5 ? 1 : 0) : 1;
  }

  void check() const {
    require_generation(kOnA2 | kOnA3);
    const Types same = {x.defined() ? x.scalar_type() : kNone};
    check_table({{"x", x, true, kFloats, 4, 5, kDocument},
                 {"attenMask", mask, false, same, 3, 5, kDocument},
                 {"relativePosBias", bias, true, same, 3, 5, kDocument},
                 {"out", *out, true, same, 4, 5, kDocument}});
    const int64_t rows = x.size(-2), columns = x.size(-1), heads = x.size(-3);
    require(count() > 0 && (x.dim() == 5 || x.size(0) % count() == 0), "attenMask", show(mask),
            "a count of windows that divides x's first dimension");
    require(!mask.defined() || (mask.numel() == count() * rows * columns && mask.size(-2) == rows &&
                                mask.size(-1) == columns),
            "attenMask", show(mask), "[W, S1, S2], [W, 1, S1, S2] or [1, W, 1, S1, S2]");
    require(
        bias.numel() == heads * rows * columns && bias.size(-3) == heads && bias.size(-2) == rows,
        "relativePosBias", show(bias), "[N, S1, S2] with ones in front");
    require(out->sizes() == x.sizes(), "out", show(*out), "the shape of x");
  }

  void run() const {
    const int64_t rows = x.size(-2), columns = x.size(-1);
    at::Tensor sum = windows().to(kF32).mul(scale);
    if (mask.defined()) sum = sum.add(mask.to(kF32).reshape({1, count(), 1, rows, columns}));
    sum = sum.add(bias.to(kF32).reshape({1, 1, x.size(-3), rows, columns}));
    out = at::softmax(sum, -1).reshape(x.sizes());
  }
};

}  // namespace

NAMED(aclnnMaskedSoftmaxWithRelPosBias, WindowSoftmax, all, check, run)

}  // namespace softnpu
