// Products of floating-point matrices: how the pages pair dtypes, and which sums they round.
// mirror-cann/ops-nn matmul/mat_mul_v3/docs/aclnnMatmul.md (aclnnMm and aclnnBatchMatMul say the
// same); fp32 results of 16-bit inputs: docs/spec/ascend-operators.md 12.3.
#include <ATen/ops/bmm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <c10/core/ScalarType.h>

#include "fused_family.h"

namespace softnpu {
namespace {

bool is_float(at::ScalarType type) { return type == kF16 || type == kBF16 || type == kF32; }

struct Product {
  at::Tensor self, mat2;
  Out out;
  int8_t cube_math_type;
  FIELDS(all, self, mat2, out, cube_math_type)

  void check() const {
    for (const auto& [name, x] :
         {std::pair("self", self), std::pair("mat2", mat2), std::pair("out", *out)})
      if (!x.defined()) throw Fault(kNnNullptr, std::string("argument '") + name + "' is null");
    const auto a = self.scalar_type(), b = mat2.scalar_type();
    if (!is_float(a) || !is_float(b)) return;  // what else torch has: ATen decides
    const bool either_bf16 = a == kBF16 || b == kBF16;
    require(on_a5() || a == b || !either_bf16, "mat2", show(mat2),
            "the dtype of self (BF16 is not paired with another one on this chip)");
    require(is_float(out->scalar_type()), "out", show(*out), show(kFloats).c_str());
    if (self.dim() > 1 || mat2.dim() > 1) check_cube(cube_math_type, c10::promoteTypes(a, b), 4);
  }

  // 16-bit inputs with a result of their dtype: ATen's own sum, rounded once. All others are summed
  // in fp32, and what is stored is that sum.
  template <class Multiply>
  void store(const Multiply& multiply) const {
    const auto a = self.scalar_type(), b = mat2.scalar_type();
    if (!is_float(a) || !is_float(b) || (a == b && a != kF32 && a == out->scalar_type())) {
      out = multiply(self, mat2);
      return;
    }
    const bool vectors = self.dim() == 1 && mat2.dim() == 1;  // cubeMathType means nothing there
    const int64_t reads = vectors || c10::promoteTypes(a, b) != kF32 ? 0 : cube_math_type;
    out = multiply(as_cube_reads(self.to(kF32), reads), as_cube_reads(mat2.to(kF32), reads));
  }
  void matmul() const {
    store([](In a, In b) { return at::matmul(a, b); });
  }
  void mm() const {
    store([](In a, In b) { return at::mm(a, b); });
  }
  void bmm() const {
    store([](In a, In b) { return at::bmm(a, b); });
  }
};

}  // namespace

NAMED(aclnnMatmul, Product, all, check, matmul)
NAMED(aclnnMm, Product, all, check, mm)
NAMED(aclnnBatchMatMul, Product, all, check, bmm)

}  // namespace softnpu
