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

struct Pack {
  static WhyNot why_not(const Context&, const at::Tensor& weight) {
    return empty("weight", weight);
  }

  static at::Tensor run(const at::Tensor& weight) {
    const at::Tensor rows = weight.contiguous();
    const int64_t experts = rows.size(0), n = rows.size(1), size = rows.size(2);
    at::Tensor tiles =
        at::empty({experts, size / kBytes, n / kRows, kRows, kBytes}, rows.options());
    const Codes codes(experts, n, size * kCodesPerByte);
    const NpuCall call("pack_mxfp4", weight);
    call.launch(npu::NpuFormatCast{{codes.in_rows(rows)}, {codes.in_tiles(tiles)}});
    return tiles;
  }
};

struct Tiled {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& weight, const at::Tensor& weight_scale,
                        const at::Tensor&) {
    return first(
        empty("x", x), empty("weight", weight),
        unless(x.size(1) % (2 * kMxBlock) == 0, "the chip takes a multiple of 64 channels"),
        unless(weight_scale.size(1) % 32 == 0, "the chip takes a multiple of 32 rows"));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale, const at::Tensor& offsets) {
    const int64_t n = weight_scale.size(1);
    const at::Tensor out = at::empty({x.size(0), n}, x.options().dtype(at::kBFloat16));
    const at::Tensor tiles = weight.contiguous(), ends = ends_of(offsets);
    const Codes codes = Codes(weight.size(0), n, x.size(1)).transposed();
    const NpuCall call("mxfp4_tiled_grouped_gemm", x);
    call.launch(npu::GroupedMatmulWeightNz{call.list(x.contiguous()),
                                           {{codes.in_tiles(tiles)}},
                                           {},
                                           {},
                                           {},
                                           call.list(paired(weight_scale).transpose(1, 2)),
                                           {},
                                           call.list(paired(x_scale)),
                                           call.maybe(&ends),
                                           {},
                                           {},
                                           {},
                                           npu::GroupedMatmul::kOneOutput,
                                           npu::GroupedMatmul::kAlongRows,
                                           npu::GroupedMatmul::kPrefixSums,
                                           npu::GroupedMatmul::kNoActivation,
                                           {},
                                           int64_t{0},
                                           call.out_list(out),
                                           {},
                                           {}});
    return out;
  }
};

const NpuRegistration<Pack, npu::NpuFormatCast> pack_mxfp4("pack_mxfp4");
const NpuRegistration<Tiled, npu::GroupedMatmulWeightNz> mxfp4_tiled_grouped_gemm(
    "mxfp4_tiled_grouped_gemm");

}  // namespace
}  // namespace dsv4::bind
