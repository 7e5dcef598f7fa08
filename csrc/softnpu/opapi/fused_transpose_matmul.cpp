// Batched products between transpositions: the grouped output projection in one call.
// mirror-cann/ops-nn matmul/transpose_batch_mat_mul/docs/aclnnTransposeBatchMatMul.md,
// matmul/transpose_quant_batch_mat_mul/docs/aclnnTransposeQuantBatchMatMul.md
#include <ATen/ops/bmm.h>

#include "fused_family.h"
#include "fused_grouped.h"

namespace softnpu {
namespace {

using Permutation = std::vector<int64_t>;
using Permutations = std::vector<Permutation>;

void require_permutation(const char* argument, const Permutation& found,
                         const Permutations& allowed) {
  std::string expected;
  for (const auto& one : allowed) {
    if (found == one) return;
    expected += (expected.empty() ? "" : " or ") + at::str(at::IntArrayRef(one));
  }
  refuse(argument, at::str(at::IntArrayRef(found)), expected);
}

struct Sizes {
  int64_t batch, m, k, n;
};

Sizes sizes_of(In x1, In x2, const Permutation& perm_x1, const Permutation& perm_x2) {
  const at::Tensor a = x1.permute(perm_x1), b = x2.permute(perm_x2);
  const Sizes sizes{a.size(0), a.size(1), a.size(2), b.size(2)};
  require(b.size(0) == sizes.batch && b.size(1) == sizes.k, "x2", show(x2),
          "batch and K of x1, as permX1 and permX2 order them");
  return sizes;
}

struct Transposed {
  at::Tensor x1, x2, bias, scale;
  Permutation perm_x1, perm_x2, perm_y;
  int8_t cube_math_type;
  int batch_split_factor;
  Out out;
  FIELDS(all, x1, x2, bias, scale, perm_x1, perm_x2, perm_y, cube_math_type, batch_split_factor,
         out)

  // The page's section for A2 and A3.
  void check_sizes(const Sizes& sizes) const {
    const bool first = perm_x1[0] == 1, turned = perm_x2[1] == 2;
    require(sizes.batch < 65536 && sizes.n < 65536, "x2", show(x2), "B and N below 65536");
    require(first || sizes.k < 65536, "x1", show(x1), "K below 65536 for permX1 [0, 1, 2]");
    require(!first || sizes.batch * sizes.k < 65536 || batch_split_factor == 1, "batchSplitFactor",
            text(batch_split_factor), "1, as B * K is above 65535");
    require(!turned || (first && batch_split_factor == 1), "permX2", "[0, 2, 1]",
            "[0, 1, 2] unless permX1 is [1, 0, 2] and batchSplitFactor 1");
  }

  void check() const {
    require_family();
    check_table({{"x1", x1, true, kFloats, 3, 3, kDocument},
                 {"x2", x2, true, kFloats, 3, 3, kDocument},
                 {"out", *out, true, kFloats, 3, 3, kDocument}});
    require(!bias.defined(), "bias", show(bias), "nothing (reserved)");
    require(!scale.defined(), "scale", show(scale), "nothing (an int8 result is not emulated)");
    require_permutation("permX1", perm_x1, {{0, 1, 2}, {1, 0, 2}});
    require_permutation("permX2", perm_x2, {{0, 1, 2}, {0, 2, 1}});
    require_permutation("permY", perm_y, {{1, 0, 2}});
    const auto dtype = x1.scalar_type();
    require(x2.scalar_type() == dtype, "x2", show(x2), "the dtype of x1");
    require(out->scalar_type() == dtype, "out", show(*out), "the dtype of x1");
    check_cube(cube_math_type, dtype, 3);
    const Sizes sizes = sizes_of(x1, x2, perm_x1, perm_x2);
    const int64_t parts = batch_split_factor;
    require(parts >= 1 && sizes.batch % parts == 0, "batchSplitFactor", text(parts),
            "a divisor of the batch");
    if (!on_a5()) check_sizes(sizes);
    if (parts == 1)
      require_sizes("out", *out, {sizes.m, sizes.batch, sizes.n});
    else
      require_sizes("out", *out, {parts, sizes.m, sizes.batch * sizes.n / parts});
  }

  void run() const {
    const auto read = [this](In x, const Permutation& perm) {
      return as_cube_reads(x.permute(perm).to(kF32), x.scalar_type() == kF32 ? cube_math_type : 0);
    };
    const at::Tensor y = at::bmm(read(x1, perm_x1), read(x2, perm_x2)).permute(perm_y);
    if (batch_split_factor == 1)
      out = y;
    else
      out = y.unflatten(1, {batch_split_factor, -1}).transpose(0, 1).flatten(2);
  }
};

// K-C: fp32 scales of rows and columns; MX: a power of two for each 32 values along K. T-C is of
// HiFloat8 only.
struct QuantTransposed {
  at::Tensor x1, x2, bias, x1_scale, x2_scale;
  int dtype;
  int64_t group_size;
  Permutation perm_x1, perm_x2, perm_y;
  int batch_split_factor;
  Out out;
  FIELDS(all, x1, x2, bias, x1_scale, x2_scale, dtype, group_size, perm_x1, perm_x2, perm_y,
         batch_split_factor, out)

  bool mx() const { return x1_scale.scalar_type() == kE8M0; }

  void check_mx(const Sizes& sizes) const {
    const int64_t pairs = sizes.k / 64;
    require(x1.scalar_type() == kE4M3 && x2.scalar_type() == kE4M3, "x1", show(x1),
            "FLOAT8_E4M3FN on both sides, as the scales are E8M0");
    require(sizes.k > 0 && sizes.k % 64 == 0, "x1", show(x1), "K a multiple of 64");
    require_sizes("x1Scale", x1_scale, {sizes.m, sizes.batch, pairs, 2});
    require_sizes("x2Scale", x2_scale,
                  perm_x2[1] == 2 ? std::vector<int64_t>{sizes.batch, sizes.n, pairs, 2}
                                  : std::vector<int64_t>{sizes.batch, pairs, sizes.n, 2});
    const int64_t m = group_size >> 32 & 0xffff, n = group_size >> 16 & 0xffff,
                  k = group_size & 0xffff;
    require(m <= 1 && n <= 1 && (k == 0 || k == 32), "groupSize",
            "[" + text(m) + ", " + text(n) + ", " + text(k) + "]", "[0 or 1, 0 or 1, 32]");
  }

  void check_columns(const Sizes& sizes) const {
    require(perm_x2[1] == 1, "permX2", "[0, 2, 1]", "[0, 1, 2], as the scales are fp32");
    require(sizes.k == 512 && sizes.n == 128, "x2", show(x2), "K 512 and N 128");
    require(group_size == 0, "groupSize", text(group_size), "0, as the scales are fp32");
    require_sizes("x1Scale", x1_scale, {sizes.m});
    require_sizes("x2Scale", x2_scale, {sizes.n});
  }

  void check() const {
    require_family(kOnA5);
    const Types fp8 = {kE4M3, kE5M2}, scales = {kF32, kE8M0};
    check_table({{"x1", x1, true, fp8, 3, 3, kDocument},
                 {"x2", x2, true, fp8, 3, 3, kDocument},
                 {"x1Scale", x1_scale, true, scales, 1, 4, kDocument},
                 {"x2Scale", x2_scale, true, scales, 1, 4, kDocument},
                 {"out", *out, true, kHalves, 3, 3, kDocument}});
    require(!bias.defined(), "bias", show(bias), "nothing (reserved)");
    require(x1_scale.scalar_type() == x2_scale.scalar_type(), "x2Scale", show(x2_scale),
            "the dtype of x1Scale");
    require(dtype == (out->scalar_type() == kF16 ? 1 : 27), "dtype", text(dtype),
            "the number of out's dtype: 1 (FLOAT16) or 27 (BFLOAT16)");
    require_permutation("permX1", perm_x1, {{1, 0, 2}});
    require_permutation("permX2", perm_x2, {{0, 1, 2}, {0, 2, 1}});
    require_permutation("permY", perm_y, {{1, 0, 2}});
    require(batch_split_factor == 1, "batchSplitFactor", text(batch_split_factor), "1");
    require(out->numel() > 0, "out", show(*out), "no empty tensor");
    const Sizes sizes = sizes_of(x1, x2, perm_x1, perm_x2);
    require_sizes("out", *out, {sizes.m, sizes.batch, sizes.n});
    mx() ? check_mx(sizes) : check_columns(sizes);
  }

  void run() const {
    at::Tensor a = x1.to(kF32).permute(perm_x1), b = x2.to(kF32).permute(perm_x2);
    if (!mx()) {
      out = at::bmm(a, b).mul(x1_scale.unsqueeze(-1)).mul(x2_scale).permute(perm_y);
      return;
    }
    const int64_t k = a.size(-1);
    const at::Tensor rows = grouped::mx_rows(x1_scale).permute(perm_x1);
    const at::Tensor columns = perm_x2[1] == 2 ? grouped::mx_rows(x2_scale).transpose(1, 2)
                                               : x2_scale.to(kF32).transpose(-1, -2).flatten(1, 2);
    a = a.mul(grouped::stretch(rows, 32, 2, k));
    b = b.mul(grouped::stretch(columns, 32, 1, k));
    out = at::bmm(a, b).permute(perm_y);
  }
};

}  // namespace

NAMED(aclnnTransposeBatchMatMul, Transposed, all, check, run)
NAMED(aclnnTransposeQuantBatchMatMul, QuantTransposed, all, check, run)

}  // namespace softnpu
