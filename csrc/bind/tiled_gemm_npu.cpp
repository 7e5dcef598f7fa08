// FP4 weights of experts in the chip's tiles: making them, and products with them.
#include <ATen/ops/empty.h>

#include "matmul_npu.h"
#include "mx_npu.h"
#include "npu/matmul.h"

namespace dsv4::bind {
namespace {

constexpr int64_t kRows = 16, kBytes = 16, kCodesPerByte = 2;

// Codes of experts [E, N, K], in rows or in tiles [E, K / 32, N / 16, 16, 32], as the chip counts:
// in codes.
struct Codes {
  std::array<int64_t, 3> sizes, strides;
  std::array<int64_t, 5> tiles;

  Codes(int64_t experts, int64_t n, int64_t k)
      : sizes{experts, n, k},
        strides{n * k, k, 1},
        tiles{experts, k / (kBytes * kCodesPerByte), n / kRows, kRows, kBytes * kCodesPerByte} {}

  npu::View in_rows(const at::Tensor& bytes) const {
    return {bytes.mutable_data_ptr(), bytes.numel() * kCodesPerByte, npu::AclType::e2m1, sizes,
            strides};
  }

  npu::View in_tiles(const at::Tensor& bytes) const {
    npu::View view = in_rows(bytes);
    view.format = npu::AclFormat::nz_of_32;
    view.tiles = tiles;
    return view;
  }

  // [E, K, N], the last two exchanged.
  Codes transposed() const {
    Codes result = *this;
    std::swap(result.sizes[1], result.sizes[2]);
    std::swap(result.strides[1], result.strides[2]);
    return result;
  }
};

at::Tensor packed(const NpuCall& call, const at::Tensor& weight) {
  const at::Tensor rows = weight.contiguous();
  const int64_t experts = rows.size(0), n = rows.size(1), size = rows.size(2);
  at::Tensor tiles = at::empty({experts, size / kBytes, n / kRows, kRows, kBytes}, rows.options());
  const Codes codes(experts, n, size * kCodesPerByte);
  call.launch(npu::NpuFormatCast{{codes.in_rows(rows)}, {codes.in_tiles(tiles)}});
  return tiles;
}

WhyNot not_tiled(const at::Tensor& x, const at::Tensor& weight_scale) {
  return first(empty("x", x), empty("weight_scale", weight_scale),
               unless(x.size(1) % (2 * kMxBlock) == 0, "the chip takes a multiple of 64 channels"),
               unless(weight_scale.size(1) % 32 == 0, "the chip takes a multiple of 32 rows"));
}

struct Pack {
  static WhyNot why_not(const Context&, const at::Tensor& weight) {
    return empty("weight", weight);
  }

  static at::Tensor run(const at::Tensor& weight) {
    return packed(NpuCall("pack_mxfp4", weight), weight);
  }
};

struct Tiled {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&, const at::Tensor&,
                        const at::Tensor& weight_scale, const at::Tensor&) {
    return not_tiled(x, weight_scale);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale, const at::Tensor& offsets) {
    return tiled_product(NpuCall("mxfp4_tiled_grouped_gemm", x), mx_rows(x, x_scale),
                         weight.contiguous(), weight_scale, Groups::between(offsets));
  }
};

// Weights as they are stored: all of them are put into tiles at every call.
struct Stored {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&, const at::Tensor&,
                        const at::Tensor& weight_scale, const at::Tensor&) {
    return not_tiled(x, weight_scale);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale, const at::Tensor& offsets) {
    const NpuCall call("mxfp4_grouped_gemm", x);
    return tiled_product(call, mx_rows(x, x_scale), packed(call, weight), weight_scale,
                         Groups::between(offsets));
  }
};

// One scale of a row per 128 channels is four equal ones per 32.
struct Official {
  static constexpr int64_t kBlocks = 4;

  static WhyNot why_not(const Context&, const at::Tensor& x, const std::optional<at::Tensor>& scale,
                        const at::Tensor&, const at::Tensor& weight_scale, const at::Tensor&) {
    return first(unless(scale.has_value(), "the chip takes FP8 rows with scales"),
                 not_tiled(x, weight_scale));
  }

  static at::Tensor run(const at::Tensor& x, const std::optional<at::Tensor>& scale,
                        const at::Tensor& weight, const at::Tensor& weight_scale,
                        const at::Tensor& offsets) {
    const at::Tensor four = scale->contiguous().view(at::kByte).repeat_interleave(kBlocks, 1);
    const at::Tensor blocks =
        four.narrow(1, 0, x.size(1) / kMxBlock).contiguous().view(scale->scalar_type());
    const NpuCall call("fp4_grouped_gemm", x);
    return tiled_product(call, mx_rows(x, blocks), packed(call, weight), weight_scale,
                         Groups::between(offsets));
  }
};

const NpuRegistration<Pack, npu::NpuFormatCast> pack_mxfp4("pack_mxfp4");
const NpuRegistration<Tiled, npu::GroupedMatmulWeightNz> mxfp4_tiled_grouped_gemm(
    "mxfp4_tiled_grouped_gemm");
const NpuRegistration<Stored, npu::GroupedMatmulWeightNz, npu::NpuFormatCast> mxfp4_grouped_gemm(
    "mxfp4_grouped_gemm");
const NpuRegistration<Official, npu::GroupedMatmulWeightNz, npu::NpuFormatCast> fp4_grouped_gemm(
    "fp4_grouped_gemm");

}  // namespace

at::Tensor tiled_product(const NpuCall& call, const MxRows& x, const at::Tensor& tiles,
                         const at::Tensor& weight_scale, const Groups& groups) {
  const int64_t n = weight_scale.size(1);
  const at::Tensor out = at::empty({x.codes.size(0), n}, x.codes.options().dtype(at::kBFloat16));
  const Codes codes = Codes(tiles.size(0), n, x.codes.size(1)).transposed();
  call.launch(npu::GroupedMatmulWeightNz{call.list(x.codes),
                                         {{codes.in_tiles(tiles)}},
                                         {},
                                         {},
                                         {},
                                         call.list(pairs_of_columns(weight_scale)),
                                         {},
                                         call.list(x.pairs),
                                         call.maybe(&groups.list),
                                         {},
                                         {},
                                         {},
                                         npu::GroupedMatmul::kOneOutput,
                                         npu::GroupedMatmul::kAlongRows,
                                         groups.type,
                                         npu::GroupedMatmul::kNoActivation,
                                         {},
                                         int64_t{0},
                                         call.out_list(out),
                                         {},
                                         {}});
  return out;
}

}  // namespace dsv4::bind
