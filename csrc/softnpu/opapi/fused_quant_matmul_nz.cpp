// The quantised product of a weight in the NZ format.
// hicann/ops-nn matmul/quant_batch_matmul_v3/docs/aclnnQuantMatmulWeightNz.md
#include <ATen/ops/empty.h>

#include "fused_quant_matmul.h"
#include "matrix.h"

namespace softnpu::quant_matmul {
namespace {

struct WeightNz {
  at::Tensor x1;
  Matrix x2;
  at::Tensor x1_scale, x2_scale, y_scale, x1_offset, x2_offset, y_offset, bias;
  bool transpose1, transpose2;
  int64_t group;
  Out out;
  FIELDS(all, x1, x2, x1_scale, x2_scale, y_scale, x1_offset, x2_offset, y_offset, bias, transpose1,
         transpose2, group, out)

  // The call on a weight in rows and columns.
  Operands on(In weight) const {
    return {x1,        transpose2 ? weight.transpose(-1, -2) : weight,
            x1_scale,  x2_scale,
            y_scale,   x1_offset,
            x2_offset, y_offset,
            bias,      transpose1,
            false,     group,
            out,       true};
  }

  void check() const {
    if (!x2.defined()) throw Fault(kNnNullptr, "argument 'x2' is null");
    require(x2.nz, "x2", show(x2), "the NZ format (29)");
    const bool bytes = x2.dtype == at::kChar || x2.dtype == kE4M3;
    require(bytes, "x2", show(x2), "int8 or FLOAT8_E4M3FN (4-bit weights are not emulated)");
    require(x2.size(-1) > 1 && x2.size(-2) > 1, "x2", show(x2), "K and N above 1");
    require(on_a5() || !x2.transposed, "x2", show(x2) + ", a transposed view",
            "no view on this chip (transposeX2 says that it is transposed)");
    require(on_a5() || group == 0, "groupSize", text(group), "0 on this chip");
    std::vector<int64_t> sizes = x2.sizes;
    if (x2.transposed) std::swap(sizes.end()[-1], sizes.end()[-2]);
    const auto like = at::TensorOptions().dtype(x2.dtype).device(at::kMeta);
    const at::Tensor rows = at::empty(sizes, like);  // its shape and strides alone
    on(x2.transposed ? rows.transpose(-1, -2) : rows).check();
  }

  void run() const { on(x2.read()).run(); }
};

}  // namespace

NAMED(aclnnQuantMatmulWeightNz, WeightNz, all, check, run)

}  // namespace softnpu::quant_matmul
