#include <ATen/ops/empty.h>

#include "matmul_npu.h"
#include "mx_npu.h"
#include "npu/matmul.h"

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

WhyNot not_alike(const char* x_name, const at::Tensor& x, const char* weight_name,
                 const at::Tensor& weight) {
  return first(not_of(x_name, x, kFloats), not_of(weight_name, weight, {x.scalar_type()}),
               empty(x_name, x), empty(weight_name, weight));
}

struct Head {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight) {
    return not_alike("x", x, "weight", weight);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight) {
    return single_product(NpuCall("lm_head", x), x, weight);
  }
};

void grouped_product(const char* op, const at::Tensor& x, const at::Tensor& weight,
                     const at::Tensor& offsets, const at::Tensor& out) {
  const at::Tensor ends = ends_of(offsets);
  const NpuCall call(op, x);
  call.launch(npu::GroupedMatmul{call.list(x.contiguous()),
                                 call.list(columns(weight)),
                                 {},
                                 {},
                                 {},
                                 {},
                                 {},
                                 {},
                                 call.maybe(&ends),
                                 {},
                                 {},
                                 {},
                                 npu::GroupedMatmul::kOneOutput,
                                 npu::GroupedMatmul::kAlongRows,
                                 npu::GroupedMatmul::kPrefixSums,
                                 npu::GroupedMatmul::kNoActivation,
                                 {},
                                 call.out_list(out),
                                 {},
                                 {}});
}

struct Grouped {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor&) {
    return not_alike("x", x, "weight", weight);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
    const at::Tensor out = rows_out(x, weight, x.scalar_type());
    grouped_product("grouped_gemm", x, weight, offsets, out);
    return out;
  }
};

struct Int8Sum {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor&) {
    return first(empty("x", x), empty("weight", weight));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
    const at::Tensor out = rows_out(x, weight, at::kInt);
    grouped_product("int8_grouped_sum", x, weight, offsets, out);
    return out;
  }
};

at::Tensor quant_product(const char* op, const at::Tensor& x, const at::Tensor& x_scale,
                         const at::Tensor& weight, const at::Tensor& column_scale, int64_t groups) {
  const at::Tensor out = rows_out(x, weight, at::kBFloat16);
  const NpuCall call(op, x);
  call.launch(npu::QuantMatmul{call.in(x.contiguous()),
                               call.in(columns(weight)),
                               call.maybe(&x_scale),
                               call.maybe(&column_scale),
                               {},
                               {},
                               {},
                               {},
                               {},
                               false,
                               false,
                               groups,
                               call.out(out)});
  return out;
}

// Exact integer sums, then both scales in fp32 and one cast.
struct Int8 {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& weight, const at::Tensor&) {
    return first(empty("x", x), empty("weight", weight));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale) {
    return quant_product("int8_gemm", x, x_scale, weight, weight_scale,
                         npu::QuantMatmul::kNoGroups);
  }
};

struct Mx {
  static WhyNot why_not(const Context& context, const at::Tensor& x, const at::Tensor&,
                        const at::Tensor& weight, const at::Tensor&) {
    return first(unless(on_a5(context), "MX products exist on A5 only"), empty("x", x),
                 empty("weight", weight),
                 unless(x.size(1) % 64 == 0, "the chip takes a multiple of 64 channels"));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale) {
    return quant_product("mxfp8_gemm", x, paired(x_scale), weight,
                         paired(weight_scale).transpose(0, 1), npu::QuantMatmul::kMxGroups);
  }
};

// One product per group of heads, its rows strided over the groups; nothing is copied.
struct OfGroups {
  static WhyNot why_not(const Context&, const at::Tensor& o, const at::Tensor& wo_a) {
    return not_alike("o", o, "wo_a", wo_a);
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

const NpuRegistration<Head, npu::Matmul> lm_head("lm_head");
const NpuRegistration<Grouped, npu::GroupedMatmul> grouped_gemm("grouped_gemm");
const NpuRegistration<Int8, npu::QuantMatmul> int8_gemm("int8_gemm");
const NpuRegistration<Int8Sum, npu::GroupedMatmul> int8_grouped_sum("int8_grouped_sum");
const NpuRegistration<Mx, npu::QuantMatmul> mxfp8_gemm("mxfp8_gemm");
const NpuRegistration<OfGroups, npu::TransposeBatchMatmul> grouped_output_projection(
    "grouped_output_projection");

}  // namespace

at::Tensor single_product(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight) {
  at::Tensor out = rows_out(x, weight, at::kFloat);
  call.launch(npu::Matmul{call.in(x), call.in(columns(weight)), call.out(out),
                          npu::Matmul::kKeepPrecision});
  return out;
}

at::Tensor product(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight) {
  const bool alike = x.scalar_type() == weight.scalar_type();
  return alike ? single_product(call, x, weight)
               : single_product(call, x.to(at::kFloat), weight.to(at::kFloat));
}

}  // namespace dsv4::bind
