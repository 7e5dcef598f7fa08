// Quantisation by blocks of two axes, and by blocks that begin anew with each group of rows.
// Tables: argument, its tensor, required, dtypes, ranks, source. Documents: hicann/ops-nn
// quant/dynamic_block_quant, grouped_dynamic_block_quant, dynamic_block_mx_quant and
// grouped_dynamic_mx_quant (docs/ of each). HIFLOAT8 and FLOAT4_E1M2 are not emulated.
#include <ATen/ops/amax.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/zeros.h>

#include <functional>
#include <limits>

#include "fused_family.h"
#include "fused_quant.h"

namespace softnpu {
namespace {

bool one_of(int64_t value, std::initializer_list<int64_t> values) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

// [..., M, N] in blocks: [..., rows of blocks, row, columns of blocks, column], zeros at the ends.
at::Tensor in_blocks(In x, int64_t row, int64_t column) {
  const auto missing = [](int64_t size, int64_t block) {
    return ceil_div(size, block) * block - size;
  };
  return at::constant_pad_nd(x, {0, missing(x.size(-1), column), 0, missing(x.size(-2), row)})
      .unflatten(-1, {-1, column})
      .unflatten(-3, {-1, row});
}

// The inverse, without the zeros.
at::Tensor out_of_blocks(In blocks, In x) {
  return blocks.flatten(-2).flatten(-3, -2).slice(-2, 0, x.size(-2)).slice(-1, 0, x.size(-1));
}

// Calls `group` with number, first and last row of each.
void for_groups(In ends, const std::function<void(int64_t, int64_t, int64_t)>& group) {
  const at::Tensor wide = ends.to(at::kLong).contiguous();
  int64_t begin = 0;
  for (int64_t i = 0; i < wide.numel(); ++i) {
    const int64_t end = wide.const_data_ptr<int64_t>()[i];
    if (end > begin) group(i, begin, end);
    begin = std::max(begin, end);
  }
}

struct BlockQuant {
  at::Tensor x, group_list;
  double min_scale;
  std::string round_mode;
  DType_ dst_type;
  int64_t row_block, column_block, group_list_type;
  Out y, scale;
  FIELDS(front, x)
  FIELDS(groups, group_list)
  FIELDS(middle, min_scale, round_mode, dst_type, row_block, column_block)
  FIELDS(kind, group_list_type)
  FIELDS(results, y, scale)
  auto plain() { return front() + middle() + results(); }
  auto grouped() { return front() + groups() + middle() + kind() + results(); }

  void check_numbers(std::initializer_list<int64_t> rows) const {
    require(min_scale >= 0, "minScale", shown(min_scale), "at least 0");
    require(round_mode.empty() || round_mode == "rint", "roundMode", round_mode, "rint");
    require(one_of(row_block, rows), "rowBlockSize", text(row_block), "a size of the document");
    require(on_a5() ? one_of(column_block, {64, 128, 192, 256}) : column_block == 128,
            "colBlockSize", text(column_block), "64, 128, 192 or 256 (A2, A3: 128)");
    require_sizes("yOut", *y, x.sizes().vec());
    auto sizes = x.sizes().vec();
    sizes.back() = ceil_div(x.size(-1), column_block);
    auto& blocks = sizes[sizes.size() - 2];
    blocks = group_list.defined() ? x.size(-2) / row_block + group_list.numel()
                                  : ceil_div(x.size(-2), row_block);
    require_sizes("scaleOut", *scale, sizes);
  }

  void check_plain() const {
    check_table({{"x", x, true, kFloats, 2, 3, kDocument},
                 {"yOut", *y, true, also_on_a5({kI8}, {kE4M3, kE5M2}), 2, 3, kDocument},
                 {"scaleOut", *scale, true, kSingle, 2, 3, kDocument}});
    require(x.numel() > 0, "x", show(x), "no empty tensor");
    if (on_a5())
      check_numbers({1, 64, 128, 256, 512});
    else
      check_numbers({1});
  }

  void check_grouped() const {
    require_generation(kOnA5);
    check_table({{"x", x, true, kHalves, 2, 3, kDocument},
                 {"groupList", group_list, true, kInts, 1, 1, kDocument},
                 {"yOut", *y, true, {kE4M3, kE5M2}, 2, 3, kDocument},
                 {"scaleOut", *scale, true, kSingle, 2, 3, kDocument}});
    require(group_list_type == 0, "groupListType", text(group_list_type), "0");
    check_numbers({1, 128, 256, 512});
  }

  struct Quantised {
    at::Tensor y, scale;
  };
  Quantised quantised(In rows) const {
    const at::Tensor blocks = in_blocks(rows.to(kF32), row_block, column_block);
    const double most = min_scale > 0 ? 1 / min_scale : std::numeric_limits<double>::infinity();
    const at::Tensor scales =
        at::amax(blocks.abs(), {-3, -1}).div(largest(y->scalar_type())).clamp_max(most);
    const at::Tensor by = scales.unsqueeze(-1).unsqueeze(-3);
    return {out_of_blocks(over(blocks, by), rows), scales};
  }

  void run_plain() const {
    const Quantised all = quantised(x);
    store_quantised(all.y, y);
    scale = all.scale;
  }

  // Rows of scales that no block has are 0, as torch_npu's own test expects.
  void run_grouped() const {
    expect_values(group_list, 0, x.size(-2) + 1, "groupList");
    const at::Tensor values = at::zeros(x.sizes(), kF32), scales = at::zeros(scale->sizes(), kF32);
    for_groups(group_list, [&](int64_t group, int64_t begin, int64_t end) {
      const Quantised some = quantised(x.slice(-2, begin, end));
      values.slice(-2, begin, end).copy_(some.y);
      const int64_t row = begin / row_block + group;
      scales.slice(-2, row, row + some.scale.size(-2)).copy_(some.scale);
    });
    store_quantised(values, y);
    scale = scales;
  }
};

struct BlockMx {
  at::Tensor x, group_index;
  std::string round_mode;
  DType_ dst_type;
  int64_t block_size, scale_alg = 0;
  double dst_type_max = 0;
  Out y, scale1, scale2;
  FIELDS(plain, x, round_mode, dst_type, scale_alg, dst_type_max, y, scale1, scale2)
  FIELDS(front, x, group_index, round_mode, dst_type, block_size)
  FIELDS(algorithm, scale_alg, dst_type_max)
  FIELDS(results, y, scale1)
  auto grouped() { return front() + results(); }
  auto grouped_v2() { return front() + algorithm() + results(); }

  bool fp4() const { return y->scalar_type() == kE2M1; }
  MxOptions options() const { return {-2, 32, scale_alg, dst_type_max, 0, rounding()}; }
  std::string rounding() const { return round_mode.empty() ? "rint" : round_mode; }

  void check_numbers() const {
    require(rounding() == "rint" || (fp4() && (round_mode == "floor" || round_mode == "round")),
            "roundMode", round_mode, fp4() ? "rint, floor or round" : "rint, as y is FLOAT8");
    require(dst_type_max == 0 || (fp4() && scale_alg == 2 && dst_type_max >= 6), "dstTypeMax",
            shown(dst_type_max), "0 (6 to 12 with scaleAlg 2 and FLOAT4_E2M1)");
    auto values = x.sizes().vec();
    if (!fp4()) require_sizes("y", *y, values);
  }

  void check_plain() const {
    require_generation(kOnA5, kWrongPlatform);
    check_table({{"x", x, true, kHalves, 2, 3, kDocument},
                 {"yOut", *y, true, {kE2M1, kE4M3, kE5M2}, 2, 3, kDocument},
                 {"scale1Out", *scale1, true, {kE8M0}, 3, 4, kDocument},
                 {"scale2Out", *scale2, true, {kE8M0}, 3, 4, kDocument}});
    require(x.numel() > 0, "x", show(x), "no empty tensor");
    check_numbers();
    require(scale_alg == 0 || (scale_alg == 2 && fp4()), "scaleAlg", text(scale_alg),
            "0, or 2 with FLOAT4_E2M1");
    require(one_of(static_cast<int64_t>(dst_type_max), {0, 6, 7}), "dstTypeMax",
            shown(dst_type_max), "0, 6 or 7");
    auto sizes = x.sizes().vec();
    sizes.back() = ceil_div(x.size(-1), 64), sizes.push_back(2);
    require_sizes("scale1Out", *scale1, sizes);
    sizes[sizes.size() - 2] = x.size(-1);
    sizes[sizes.size() - 3] = ceil_div(x.size(-2), 64);
    require_sizes("scale2Out", *scale2, sizes);
  }

  void check_grouped() const {
    require_generation(kOnA5, kWrongPlatform);
    check_table({{"x", x, true, kHalves, 2, 2, kDocument},
                 {"groupIndex", group_index, true, kInts, 1, 1, kDocument},
                 {"y", *y, true, {kE2M1, kE4M3, kE5M2}, 2, 2, kDocument},
                 {"mxscale", *scale1, true, {kE8M0}, 3, 3, kDocument}});
    require(block_size == 32, "blocksize", text(block_size), "32");
    check_numbers();
    require(scale_alg == 0 || scale_alg == (fp4() ? 2 : 1), "scaleAlg", text(scale_alg),
            fp4() ? "0 or 2, as y is FLOAT4_E2M1" : "0 or 1, as y is FLOAT8");
    require_sizes("mxscale", *scale1, {x.size(0) / 64 + group_index.numel(), x.size(1), 2});
  }

  void run_plain() const {
    const at::Tensor blocks = in_blocks(x.to(at::kDouble), 32, 32);
    const at::Tensor exponents =
        shared_exponents(at::amax(blocks.abs(), {-3, -1}), y->scalar_type(), options());
    const at::Tensor by = at::exp2(exponents.neg()).unsqueeze(-1).unsqueeze(-3);
    const at::Tensor values = out_of_blocks(blocks.mul(by), x);
    store_bytes(y, mx_values(values, y->scalar_type(), rounding()).view(at::kByte));
    const at::Tensor bytes = exponent_bytes(exponents);
    const int64_t rows = bytes.size(-2), columns = bytes.size(-1);
    store_bytes(scale1, at::constant_pad_nd(bytes, {0, columns % 2})
                            .repeat_interleave(32, -2)
                            .slice(-2, 0, x.size(-2))
                            .unflatten(-1, {-1, 2}));
    store_bytes(scale2, at::constant_pad_nd(bytes, {0, 0, 0, rows % 2})
                            .repeat_interleave(32, -1)
                            .slice(-1, 0, x.size(-1))
                            .unflatten(-2, {-1, 2})
                            .transpose(-1, -2));
  }

  // Rows of scales that no block has are 0: our reading of "padded".
  void run_grouped() const {
    expect_values(group_index, 0, x.size(0) + 1, "groupIndex");
    const at::Tensor scales = at::zeros(scale1->sizes(), at::kByte);
    y.touch();
    for_groups(group_index, [&](int64_t group, int64_t begin, int64_t end) {
      const Mx some = mx_quantise(x.slice(0, begin, end), y->scalar_type(), options());
      y->slice(0, begin, end).view(at::kByte).copy_(some.y.view(at::kByte));
      const int64_t row = begin / 64 + group;
      scales.slice(0, row, row + some.scale.size(0)).copy_(some.scale);
    });
    store_bytes(scale1, scales);
  }
};

}  // namespace

NAMED(aclnnDynamicBlockQuant, BlockQuant, plain, check_plain, run_plain)
NAMED(aclnnGroupedDynamicBlockQuant, BlockQuant, grouped, check_grouped, run_grouped)
NAMED(aclnnDynamicBlockMxQuant, BlockMx, plain, check_plain, run_plain)
NAMED(aclnnGroupedDynamicMxQuant, BlockMx, grouped, check_grouped, run_grouped)
NAMED(aclnnGroupedDynamicMxQuantV2, BlockMx, grouped_v2, check_grouped, run_grouped)

}  // namespace softnpu
