// Products of codes with scales: int8, MX and FP8 with tiles of 128x128.
#include <ATen/ops/empty.h>

#include "matmul_npu.h"
#include "mx_npu.h"
#include "npu/matmul.h"

namespace dsv4::bind {
namespace {

at::Tensor quant_product(const char* op, const at::Tensor& x, const at::Tensor& weight,
                         const Scales& scales, int64_t group_size) {
  const at::Tensor out = rows_out(x, weight, at::kBFloat16);
  quant_product(NpuCall(op, x), x, weight, scales, group_size, out);
  return out;
}

at::Tensor grouped_quant_product(const char* op, const at::Tensor& x, const at::Tensor& weight,
                                 const at::Tensor& offsets, const Scales& scales) {
  const at::Tensor out = rows_out(x, weight, at::kBFloat16);
  grouped_product(NpuCall(op, x), x, weight, Groups::between(offsets), out, scales);
  return out;
}

WhyNot nothing(const at::Tensor& x, const at::Tensor& weight) {
  return first(empty("x", x), empty("weight", weight));
}

// Exact integer sums, then both scales in fp32 and one cast.
struct Int8Gemm {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& weight, const at::Tensor&) {
    return nothing(x, weight);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale) {
    return quant_product("int8_gemm", x, weight, {x_scale, weight_scale},
                         npu::QuantMatmul::kNoGroups);
  }
};

// A bf16 result wants bf16 scales of weights, which the contract's are.
struct Int8Grouped {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& weight, const at::Tensor&, const at::Tensor&) {
    return nothing(x, weight);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale, const at::Tensor& offsets) {
    return grouped_quant_product("int8_grouped_gemm", x, weight, offsets,
                                 {x_scale.contiguous(), weight_scale.to(at::kBFloat16)});
  }
};

WhyNot not_mx(const Context& context, const at::Tensor& x, const at::Tensor& weight) {
  return first(unless(on_a5(context), "MX products exist on A5 only"), nothing(x, weight),
               unless(x.size(1) % (2 * kMxBlock) == 0, "the chip takes a multiple of 64 channels"));
}

Scales mx_scales(const at::Tensor& of_x, const at::Tensor& of_weight) {
  return {paired(of_x), pairs_of_columns(of_weight)};
}

struct Mx {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& weight, const at::Tensor&) {
    return not_mx(context, x, weight);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale) {
    return quant_product("mxfp8_gemm", x, weight, mx_scales(x_scale, weight_scale),
                         npu::QuantMatmul::kMxGroups);
  }
};

struct MxGrouped {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& weight, const at::Tensor&, const at::Tensor&) {
    return not_mx(context, x, weight);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale, const at::Tensor& offsets) {
    return grouped_quant_product("mxfp8_grouped_gemm", x, weight, offsets,
                                 mx_scales(x_scale, weight_scale));
  }
};

WhyNot not_tiles(const Context& context, const at::Tensor& x, const Optional& x_scale,
                 const at::Tensor& weight) {
  return first(unless(on_a5(context), "FP8 products exist on A5 only"),
               unless(x_scale.has_value(), "the chip takes FP8 rows with scales"),
               nothing(x, weight));
}

// fp32 values of E8M0 scales, by their bits: the chip's Cast knows no E8M0.
at::Tensor widened(const at::Tensor& scale) {
  constexpr int64_t mantissa_bits = 23, half_of_least = 1 << 22, nan = 0x7FC00000;
  const at::Tensor exponent = scale.contiguous().view(at::kByte).to(at::kInt);
  return exponent.mul(int64_t{1} << mantissa_bits)
      .masked_fill_(exponent.eq(0), half_of_least)
      .masked_fill_(exponent.eq(255), nan)
      .view(at::kFloat);
}

// The chip takes fp32 scales of blocks of 128.
Scales tile_scales(const Optional& of_x, const at::Tensor& of_weight) {
  return {widened(*of_x), widened(of_weight).transpose(-1, -2)};
}

struct Tiles {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const Optional& x_scale,
                        const at::Tensor& weight, const at::Tensor&) {
    return not_tiles(context, x, x_scale, weight);
  }

  static at::Tensor run(const at::Tensor& x, const Optional& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale) {
    return quant_product("fp8_gemm", x, weight, tile_scales(x_scale, weight_scale),
                         npu::QuantMatmul::kTileGroups);
  }
};

struct TilesGrouped {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const Optional& x_scale,
                        const at::Tensor& weight, const at::Tensor&, const at::Tensor&) {
    return not_tiles(context, x, x_scale, weight);
  }

  static at::Tensor run(const at::Tensor& x, const Optional& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale, const at::Tensor& offsets) {
    return grouped_quant_product("fp8_grouped_gemm", x, weight, offsets,
                                 tile_scales(x_scale, weight_scale));
  }
};

const NpuRegistration<Int8Gemm, npu::QuantMatmul> int8_gemm("int8_gemm");
const NpuRegistration<Int8Grouped, npu::GroupedMatmul> int8_grouped_gemm("int8_grouped_gemm");
const NpuRegistration<Mx, npu::QuantMatmul> mxfp8_gemm("mxfp8_gemm");
const NpuRegistration<MxGrouped, npu::GroupedMatmul> mxfp8_grouped_gemm("mxfp8_grouped_gemm");
const NpuRegistration<Tiles, npu::QuantMatmul> fp8_gemm("fp8_gemm", Kind::composite);
const NpuRegistration<TilesGrouped, npu::GroupedMatmul> fp8_grouped_gemm("fp8_grouped_gemm",
                                                                         Kind::composite);

}  // namespace
}  // namespace dsv4::bind
