// SwiGLU of the rows of all groups, quantised to FLOAT8. Tables: argument, its tensor, required,
// dtypes, ranks, source.
#include <ATen/ops/amax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>

#include <limits>

#include "fused_family.h"
#include "fused_quant.h"

namespace softnpu {
namespace {

struct BlockRows {
  at::Tensor y, scale;  // FLOAT8, and [rows, blocks] in fp32
};

// The exponent of a power of two that is not below a positive fp32, from its bits.
at::Tensor rounded_up(In scale) {
  const at::Tensor bits = scale.contiguous().view(at::kInt);
  const at::Tensor exponent = bits.bitwise_right_shift(23).sub(127);
  return exponent.add(bits.bitwise_and(0x7fffff).ne(0).to(at::kInt));
}

// Each block by its largest finite magnitude, at least 1e-4.
BlockRows quantised_blocks(In h, at::ScalarType type, int64_t block, bool round_scale) {
  const at::Tensor blocks = h.unflatten(-1, {-1, block});
  const at::Tensor finite = at::where(at::isfinite(blocks), blocks.abs(), 0.0);
  const at::Tensor peak = at::amax(finite, {-1}).clamp_min(1e-4);
  at::Tensor scale = peak.div(largest(type)), inverse = scale.reciprocal();
  if (round_scale) {
    const at::Tensor exponent = rounded_up(scale);
    scale = at::exp2(exponent.to(kF32));
    inverse = at::exp2(exponent.neg().to(kF32));
  }
  const at::Tensor scaled = blocks.mul(inverse.unsqueeze(-1)).flatten(-2);
  return {saturated(at::where(at::isfinite(scaled), scaled, h), type), scale};
}

// mirror-cann/ops-nn activation/swiglu_group_quant/docs/aclnnSwigluGroupQuant.md: FLOAT8 in blocks
// of 128 (mode 0) or MX (mode 1). The custom packages have others of this name.
struct SwigluGroup {
  at::Tensor x, weight, group_index, inv_scale;
  int64_t dst_type, quant_mode, block_size;
  bool round_scale;
  double clamp_limit, dst_type_max;
  bool output_origin;
  Out y, y_scale, y_origin;
  FIELDS(all, x, weight, group_index, inv_scale, dst_type, quant_mode, block_size, round_scale,
         clamp_limit, dst_type_max, output_origin, y, y_scale, y_origin)

  int64_t block() const { return quant_mode == 1 ? 32 : 128; }

  void check_modes() const {
    require(quant_mode == 0 || quant_mode == 1, "quantMode", text(quant_mode),
            "0 (blocks of 128) or 1 (MX); HiFloat8 is not emulated");
    require(dst_type == (y->scalar_type() == kE4M3 ? 36 : 35), "dstType", text(dst_type),
            "the number of yOut's dtype: 35 (E5M2) or 36 (E4M3FN); FLOAT4 is not emulated");
    require(block_size == 0 || block_size == block(), "blockSize", text(block_size),
            quant_mode == 1 ? "0 or 32" : "0 or 128");
    require(round_scale || quant_mode == 0, "roundScale", "false", "true in mode 1");
    require(clamp_limit == -1 || clamp_limit > 0, "clampLimit", std::to_string(clamp_limit),
            "-1 (none), or a positive number");
    require(!output_origin, "outputOrigin", "true", "false in modes 0 and 1");
  }

  void check_shapes() const {
    const int64_t half = x.size(-1) / 2;
    require(x.size(-1) >= 256 && x.size(-1) % 256 == 0, "x", show(x),
            "a last dimension of at least 256, a multiple of it");
    require(x.numel() > 0, "x", show(x), "no empty tensor");
    if (weight.defined())
      require(weight.numel() == x.numel() / x.size(-1), "weight", show(weight),
              "a value for each row of x");
    if (group_index.defined())
      require(group_index.numel() > 0, "groupIndex", show(group_index), "no empty tensor");
    require_sizes("yOut", *y, but_last(x, {half}));
    require_sizes("yScaleOut", *y_scale,
                  quant_mode == 1 ? but_last(x, {ceil_div(half, 64), 2})
                                  : but_last(x, {ceil_div(half, 128)}));
  }

  void check() const {
    require_family(kOnA5);
    const auto type = x.defined() ? x.scalar_type() : kNone;
    const Types scales = {quant_mode == 1 ? kE8M0 : kF32};
    check_table({{"x", x, true, kHalves, 2, 8, kReading},  // fp32 by the page, not by its tiling
                 {"weight", weight, false, {kF32}, 1, 8, kReading},  // its example has [rows]
                 {"groupIndex", group_index, false, {at::kLong}, 1, 1, kDocument},
                 {"yOut", *y, true, {kE4M3, kE5M2}, 2, 8, kDocument},
                 {"yScaleOut", *y_scale, true, scales, 1, 8, kDocument},
                 {"yOriginOut", *y_origin, true, {type}, 2, 8, kDocument}});
    require(!inv_scale.defined(), "scale", show(inv_scale), "nothing (of mode 2)");
    check_modes();
    for (const auto& [name, tensor] :
         {std::pair("x", x), std::pair("yOut", *y), std::pair("yScaleOut", *y_scale)})
      require(tensor.is_contiguous(), name, show(tensor) + " with gaps", "a contiguous tensor");
    refusing_with(kTilingRefuses, [this] { check_shapes(); });
  }

  at::Tensor activated(int64_t all, int64_t rows) const {
    const auto halves = x.view({all, -1}).slice(0, 0, rows).to(kF32).chunk(2, -1);
    at::Tensor gate = halves[0], up = halves[1];
    if (clamp_limit > 0) {
      gate = gate.clamp_max(clamp_limit);
      up = up.clamp(-clamp_limit, clamp_limit);
    }
    const at::Tensor h = gate.mul(at::sigmoid(gate)).mul(up);
    return weight.defined() ? h.mul(weight.reshape({all, 1}).slice(0, 0, rows)) : h;
  }

  void run() const {
    const int64_t all = x.numel() / x.size(-1);
    int64_t rows = all;
    if (group_index.defined()) {  // more than there are rows: all of them
      expect_values(group_index, 0, std::numeric_limits<int64_t>::max(), "groupIndex");
      rows = std::min(all, at::sum(group_index).item<int64_t>());
    }
    y.touch();  // rows of no group are not written
    if (rows == 0) return;
    const BlockRows blocks =
        quantised_blocks(activated(all, rows), y->scalar_type(), block(), round_scale);
    y->view({all, -1}).slice(0, 0, rows).view(at::kByte).copy_(blocks.y.view(at::kByte));
    y_scale.touch();
    y_scale->view({all, -1}).slice(0, 0, rows).copy_(blocks.scale);  // E8M0: exact powers of two
  }
};

// Its gradient: no page that we found; shapes as torch_npu allocates them, values as its test has
// them. Where the clamp holds there is none, and none in rows of no group.
struct SwigluGroupGrad {
  at::Tensor y_grad, x, weight, y_origin, group_index;
  double clamp_limit;
  Out x_grad, weight_grad;
  FIELDS(all, y_grad, x, weight, y_origin, group_index, clamp_limit, x_grad, weight_grad)

  void check() const {
    require_generation(kOnA5);
    const Types same = {x.defined() ? x.scalar_type() : kNone};
    check_table({{"yGrad", y_grad, true, same, 2, 8, kReading},
                 {"x", x, true, kFloats, 2, 8, kReading},
                 {"weight", weight, false, kSingle, 2, 8, kReading},
                 {"yOrigin", y_origin, weight.defined(), same, 2, 8, kReading},
                 {"groupIndex", group_index, false, {at::kLong}, 1, 1, kReading},
                 {"xGrad", *x_grad, true, same, 2, 8, kReading}});
    require(x.size(-1) % 2 == 0, "x", show(x), "an even last dimension");
    require_sizes("yGrad", y_grad, but_last(x, {x.size(-1) / 2}));
    require_sizes("xGrad", *x_grad, x.sizes().vec());
    if (!weight.defined()) return;
    require_sizes("weight", weight, but_last(x, {1}));
    require_sizes("yOrigin", y_origin, y_grad.sizes().vec());
    require(weight_grad->sizes() == weight.sizes(), "weightGrad", show(*weight_grad),
            "the shape of weight");
  }

  void run() const {
    const int64_t width = x.size(-1), rows = x.numel() / width;
    const auto flat = [rows](In t) { return t.to(kF32).reshape({rows, -1}); };
    at::Tensor used = at::ones({rows, 1}, kF32);
    if (group_index.defined()) {
      expect_values(group_index, 0, std::numeric_limits<int64_t>::max(), "groupIndex");
      used.slice(0, std::min(rows, at::sum(group_index).item<int64_t>())).zero_();
    }
    const auto halves = flat(x).chunk(2, -1);
    at::Tensor gate = halves[0], up = halves[1], open = used, linear = used;
    if (clamp_limit != 0) {
      open = used.mul(gate.lt(clamp_limit)), linear = used.mul(up.abs().lt(clamp_limit));
      gate = gate.clamp_max(clamp_limit), up = up.clamp(-clamp_limit, clamp_limit);
    }
    at::Tensor g = flat(y_grad);
    if (weight.defined()) {
      weight_grad = g.mul(flat(y_origin)).sum(-1, true).mul(used).reshape(weight.sizes());
      g = g.mul(flat(weight));
    }
    const at::Tensor s = at::sigmoid(gate), silu = gate.mul(s);
    const at::Tensor slope = s.mul(gate.mul(s.neg().add(1)).add(1));
    x_grad =
        at::cat({g.mul(up).mul(slope).mul(open), g.mul(silu).mul(linear)}, -1).reshape(x.sizes());
  }
};

}  // namespace

NAMED(aclnnSwigluGroupQuant, SwigluGroup, all, check, run)
NAMED(aclnnSwigluGroupQuantGrad, SwigluGroupGrad, all, check, run)

}  // namespace softnpu
