#include <ATen/ops/empty.h>

#include "npu/matmul.h"
#include "npu_call.h"

namespace dsv4::bind {
namespace {

// Rows [T, K] times the transposed weight [N, K] as the products want it: a view.
at::Tensor columns(const at::Tensor& weight) { return weight.contiguous().transpose(-1, -2); }

// Ends of the groups, int64 [E], of int32 offsets [E+1] that begin with 0.
at::Tensor ends_of(const at::Tensor& offsets) {
  return offsets.narrow(0, 1, offsets.size(0) - 1).to(at::kLong);
}

at::Tensor rows_out(const at::Tensor& x, const at::Tensor& weight, at::ScalarType type) {
  return at::empty({x.size(0), weight.size(-2)}, x.options().dtype(type));
}

struct Head {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor& weight) {
    return first(not_available<npu::Matmul>(context), not_of("x", x, kFloats),
                 not_of("weight", weight, {x.scalar_type()}), empty("x", x),
                 empty("weight", weight));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight) {
    const at::Tensor out = rows_out(x, weight, at::kFloat);
    const NpuCall call("lm_head", x);
    call.launch(npu::Matmul{call.in(x), call.in(columns(weight)), call.out(out),
                            npu::Matmul::kKeepPrecision});
    return out;
  }
};

struct Grouped {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor&) {
    return first(not_available<npu::GroupedMatmul>(context), not_of("x", x, kFloats),
                 not_of("weight", weight, {x.scalar_type()}), empty("x", x),
                 empty("weight", weight));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
    const at::Tensor out = rows_out(x, weight, x.scalar_type());
    grouped("grouped_gemm", x, weight, {}, {}, offsets, out);
    return out;
  }

  static void grouped(const char* op, const at::Tensor& x, const at::Tensor& weight,
                      const at::Tensor& scale, const at::Tensor& per_row, const at::Tensor& offsets,
                      const at::Tensor& out) {
    const at::Tensor ends = ends_of(offsets), rows = x.contiguous();
    const NpuCall call(op, x);
    call.launch(npu::GroupedMatmul{call.list<npu::InList>({rows}),
                                   call.list<npu::InList>({columns(weight)}),
                                   {},
                                   call.list<npu::OptionalInList>({scale}),
                                   {},
                                   {},
                                   {},
                                   call.list<npu::OptionalInList>({per_row}),
                                   call.maybe(&ends),
                                   {},
                                   {},
                                   {},
                                   npu::GroupedMatmul::kOneOutput,
                                   npu::GroupedMatmul::kAlongRows,
                                   npu::GroupedMatmul::kPrefixSums,
                                   npu::GroupedMatmul::kNoActivation,
                                   {},
                                   call.list<npu::OutList>({out}),
                                   {},
                                   {}});
  }
};

// Exact integer sums, then both scales in fp32 and one cast.
struct Int8 {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& weight, const at::Tensor&) {
    return first(not_available<npu::QuantMatmul>(context), empty("x", x), empty("weight", weight));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale) {
    const at::Tensor out = rows_out(x, weight, at::kBFloat16);
    const NpuCall call("int8_gemm", x);
    call.launch(npu::QuantMatmul{call.in(x.contiguous()),
                                 call.in(columns(weight)),
                                 call.maybe(&x_scale),
                                 call.maybe(&weight_scale),
                                 {},
                                 {},
                                 {},
                                 {},
                                 {},
                                 false,
                                 false,
                                 npu::QuantMatmul::kNoGroups,
                                 call.out(out)});
    return out;
  }
};

struct Int8Sum {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor&) {
    return first(not_available<npu::GroupedMatmul>(context), empty("x", x),
                 empty("weight", weight));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
    const at::Tensor out = rows_out(x, weight, at::kInt);
    Grouped::grouped("int8_grouped_sum", x, weight, {}, {}, offsets, out);
    return out;
  }
};

// The two of a pair of blocks lie together: [.., K / 32] as [.., K / 64, 2].
at::Tensor paired(const at::Tensor& scale) { return scale.contiguous().unflatten(-1, {-1, 2}); }

struct Mx {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& weight, const at::Tensor&) {
    return first(not_available<npu::QuantMatmul>(context),
                 unless(on_a5(context), "MX products exist on A5 only"), empty("x", x),
                 empty("weight", weight),
                 unless(x.size(1) % 64 == 0, "the chip takes a multiple of 64 channels"));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale) {
    const at::Tensor out = rows_out(x, weight, at::kBFloat16);
    const at::Tensor row_scales = paired(x_scale);
    const at::Tensor column_scales = paired(weight_scale).transpose(0, 1);
    const NpuCall call("mxfp8_gemm", x);
    call.launch(npu::QuantMatmul{call.in(x.contiguous()),
                                 call.in(columns(weight)),
                                 call.maybe(&row_scales),
                                 call.maybe(&column_scales),
                                 {},
                                 {},
                                 {},
                                 {},
                                 {},
                                 false,
                                 false,
                                 npu::QuantMatmul::kMxGroups,
                                 call.out(out)});
    return out;
  }
};

// One product per group of heads, its rows strided over the groups; nothing is copied.
struct OfGroups {
  static WhyNot why_not(const Context& context, const at::Tensor& o, const at::Tensor& wo_a) {
    return first(not_available<npu::TransposeBatchMatmul>(context), not_of("o", o, kFloats),
                 not_of("wo_a", wo_a, {o.scalar_type()}), empty("o", o), empty("wo_a", wo_a));
  }

  static at::Tensor run(const at::Tensor& o, const at::Tensor& wo_a) {
    const int64_t tokens = o.size(0), groups = wo_a.size(0);
    const at::Tensor grouped = o.contiguous().view({tokens, groups, -1});
    const at::Tensor out = at::empty({tokens, groups, wo_a.size(1)}, o.options());
    const NpuCall call("grouped_output_projection", o);
    call.launch(npu::TransposeBatchMatmul{call.in(grouped),
                                          call.in(wo_a.contiguous()),
                                          {},
                                          {},
                                          {{1, 0, 2}},
                                          {{0, 2, 1}},
                                          {{1, 0, 2}},
                                          npu::TransposeBatchMatmul::kKeepPrecision,
                                          npu::TransposeBatchMatmul::kNotSplit,
                                          call.out(out)});
    return out.flatten(1);
  }
};

const npu::List<npu::TransposeBatchMatmul> transpose_batch_matmul;
const npu::List<npu::Matmul> matmul;
const npu::List<npu::GroupedMatmul> grouped_matmul;
const npu::List<npu::QuantMatmul> quant_matmul;
const NpuRegistration<Head::run, Head::why_not> lm_head("lm_head", "aclnnMatmul");
const NpuRegistration<Grouped::run, Grouped::why_not> grouped("grouped_gemm",
                                                              "aclnnGroupedMatmulV5");
const NpuRegistration<Int8::run, Int8::why_not> int8("int8_gemm", "aclnnQuantMatmulV5");
const NpuRegistration<Int8Sum::run, Int8Sum::why_not> int8_sum("int8_grouped_sum",
                                                               "aclnnGroupedMatmulV5");
const NpuRegistration<Mx::run, Mx::why_not> mx("mxfp8_gemm", "aclnnQuantMatmulV5");
const NpuRegistration<OfGroups::run, OfGroups::why_not> of_groups("grouped_output_projection",
                                                                  "aclnnTransposeBatchMatMul");

}  // namespace
}  // namespace dsv4::bind
