// A product of each piece of a row with one small matrix, and the quantised result.
// mirror-cann/ops-nn matmul/rotate_quant/docs/aclnnRotateQuant.md; that the product is rounded to
// x's dtype before its maximum is taken: docs/spec/ascend-operators.md 12.4 and the launch plan.
#include <ATen/ops/amax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/round.h>
#include <ATen/ops/where.h>

#include "fused_family.h"
#include "fused_quant.h"

namespace softnpu {
namespace {

struct Rotate {
  at::Tensor x, rotation, alpha;
  int64_t axis;
  std::string round_mode;
  int64_t scale_alg;
  double dst_type_max;
  bool trans;
  Out y, scale;
  FIELDS(all, x, rotation, alpha, axis, round_mode, scale_alg, dst_type_max, trans, y, scale)

  bool fp4() const { return y->scalar_type() == kE2M1; }

  void check_table_of_chip() const {
    const auto type = x.defined() ? x.scalar_type() : kNone;
    const bool a5 = on_a5();
    const int64_t highest = a5 ? 7 : 2;
    check_table({{"x", x, true, kHalves, a5 ? 1 : 2, highest, kDocument},
                 {"rotation", rotation, true, {type}, 2, a5 ? 3 : 2, kDocument},
                 {"alpha", alpha, false, {kBF16}, 1, 1, kDocument},
                 {"yOut", *y, true, a5 ? Types{kE2M1, kE4M3, kE5M2} : Types{kI8, kI32}, a5 ? 1 : 2,
                  highest, kDocument},
                 {"scaleOut", *scale, true, {a5 ? kE8M0 : kF32}, 1, a5 ? 8 : 1, kDocument}});
  }

  void check_modes() const {
    require(axis == -1 || axis == x.dim() - 1, "axis", text(axis), "-1 or the last dimension");
    require(!trans, "trans", "true", "false");
    const bool rint_only = on_a5() && !fp4();
    require(round_mode.empty() || round_mode == "rint" ||
                (!rint_only && (round_mode == "round" || round_mode == "floor")),
            "roundMode", round_mode,
            rint_only ? "rint, as yOut is FLOAT8" : "rint, round or floor");
    if (!on_a5()) {
      require(!alpha.defined(), "alpha", show(alpha), "nothing on this chip");
      require(scale_alg == 0, "scaleAlg", text(scale_alg), "0 on this chip");
      require(dst_type_max == 0, "dstTypeMax", std::to_string(dst_type_max), "0 on this chip");
      return;
    }
    require(!alpha.defined() || alpha.numel() == 1, "alpha", show(alpha), "[1]");
    require(scale_alg == 0 || scale_alg == (fp4() ? 2 : 1), "scaleAlg", text(scale_alg),
            fp4() ? "0 or 2, as yOut is FLOAT4_E2M1" : "0 or 1, as yOut is FLOAT8");
    require(scale_alg == 2 ? dst_type_max >= 6 && dst_type_max <= 12 : dst_type_max == 0,
            "dstTypeMax", std::to_string(dst_type_max), "6 to 12 with scaleAlg 2, else 0");
  }

  void check_shapes() const {
    const int64_t n = x.size(-1), k = rotation.size(-1);
    require(x.numel() > 0, "x", show(x), "no empty tensor");
    require(rotation.size(-2) == k, "rotation", show(rotation), "a square matrix");
    if (on_a5()) {
      require(k == 32 || k == 64 || k == 128, "rotation", show(rotation), "K of 32, 64 or 128");
    } else {
      require(k >= 16 && k <= 1024, "rotation", show(rotation), "K of 16 to 1024");
      require(n >= 128 && n <= 16000 && n % 8 == 0, "x", show(x),
              "a last dimension of 128 to 16000, a multiple of 8");
    }
    require(n % k == 0, "x", show(x), "a last dimension that is a multiple of K");
    if (rotation.dim() == 3)
      require(rotation.size(0) == n / k, "rotation", show(rotation), "[N / K, K, K]");
    const auto type = y->scalar_type();
    require_sizes("yOut", *y, but_last(x, {type == kI32 ? n / 8 : type == kE2M1 ? n / 2 : n}));
    require_sizes("scaleOut", *scale,
                  on_a5() ? but_last(x, {ceil_div(n, 64), 2}) : but_last(x, {}));
  }

  void check() const {
    require_family();
    check_table_of_chip();
    check_modes();
    check_shapes();
  }

  at::Tensor rotated() const {
    const int64_t k = rotation.size(-1);
    const at::Tensor pieces = x.to(kF32).unflatten(-1, {-1, 1, k});
    return at::matmul(pieces, rotation.to(kF32)).flatten(-3).to(x.scalar_type()).to(kF32);
  }

  // Where alpha lies in (0, 1): each 32 values within that share of their largest magnitude.
  at::Tensor clamped(In values) const {
    const double share = alpha.defined() ? alpha.to(kF32).item<double>() : 0;
    if (share <= 0 || share >= 1) return values;
    const at::Tensor groups = values.unflatten(-1, {-1, 32});
    const at::Tensor limit = at::amax(groups.abs(), {-1}, true).mul(share);
    return at::where(groups.abs().gt(limit), limit.mul(groups.sign()), groups).flatten(-2);
  }

  void run() const {
    const at::Tensor values = rotated();
    if (on_a5()) {
      const Mx mx = mx_quantise(
          clamped(values), y->scalar_type(),
          {-1, 32, scale_alg, dst_type_max, 0, round_mode.empty() ? "rint" : round_mode});
      store_bytes(y, mx.y.view(at::kByte));
      store_bytes(scale, mx.scale);
      return;
    }
    const bool packed = y->scalar_type() == kI32;  // eight int4
    const Int8Rows rows =
        quantised_rows(values, packed ? 7 : 127);  // roundMode: rint always (read)
    scale = rows.scale;
    if (packed)
      store_bytes(y, pack(rows.y));
    else
      y = rows.y;
  }
};

}  // namespace

NAMED(aclnnRotateQuant, Rotate, all, check, run)

}  // namespace softnpu
