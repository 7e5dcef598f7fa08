#include <ATen/ops/empty.h>

#include "matmul_npu.h"
#include "npu/matmul.h"

namespace dsv4::bind {
namespace {

WhyNot not_alike(const char* x_name, const at::Tensor& x, const char* weight_name,
                 const at::Tensor& weight) {
  return first(not_of(x_name, x, kFloats), not_of(weight_name, weight, {x.scalar_type()}),
               empty(x_name, x), empty(weight_name, weight));
}

struct LmHead {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight) {
    return not_alike("x", x, "weight", weight);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight) {
    return single_product(NpuCall("lm_head", x), x, weight);
  }
};

struct Linear {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight) {
    return not_alike("x", x, "weight", weight);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight) {
    const at::Tensor out = rows_out(x, weight, x.scalar_type());
    product_into(NpuCall("linear", x), x, weight, out);
    return out;
  }
};

struct Grouped {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor&) {
    return not_alike("x", x, "weight", weight);
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
    const at::Tensor out = rows_out(x, weight, x.scalar_type());
    grouped_product(NpuCall("grouped_gemm", x), x, weight, Groups::between(offsets), out);
    return out;
  }
};

// Two products of the same rows, whose results lie apart.
struct Pair {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& first_weight,
                        const at::Tensor& second_weight) {
    return first(not_of("x", x, kHalves), not_alike("x", x, "first_weight", first_weight),
                 not_alike("x", x, "second_weight", second_weight));
  }

  static std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& x, const at::Tensor& first_weight,
                                                const at::Tensor& second_weight) {
    at::Tensor first_out = rows_out(x, first_weight, x.scalar_type());
    at::Tensor second_out = rows_out(x, second_weight, x.scalar_type());
    paired_product(NpuCall("linear_pair", x), x, first_weight, second_weight, first_out,
                   second_out);
    return {first_out, second_out};
  }
};

struct Int8Sum {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor&) {
    return first(empty("x", x), empty("weight", weight));
  }

  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
    const at::Tensor out = rows_out(x, weight, at::kInt);
    grouped_product(NpuCall("int8_grouped_sum", x), x, weight, Groups::between(offsets), out);
    return out;
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

const NpuRegistration<LmHead, npu::Matmul> lm_head("lm_head");
const NpuRegistration<Linear, npu::Matmul> linear("linear");
const NpuRegistration<Grouped, npu::GroupedMatmul> grouped_gemm("grouped_gemm");
const NpuRegistration<Pair, npu::GroupedMatmul> linear_pair("linear_pair");
const NpuRegistration<Int8Sum, npu::GroupedMatmul> int8_grouped_sum("int8_grouped_sum");
const NpuRegistration<OfGroups, npu::TransposeBatchMatmul> grouped_output_projection(
    "grouped_output_projection");

}  // namespace

at::Tensor columns(const at::Tensor& weight) { return weight.contiguous().transpose(-1, -2); }

at::Tensor rows_out(const at::Tensor& x, const at::Tensor& weight, at::ScalarType type) {
  return at::empty({x.size(0), weight.size(-2)}, x.options().dtype(type));
}

Groups Groups::counted(const at::Tensor& counts) { return {counts, npu::GroupedMatmul::kCounts}; }

Groups Groups::between(const at::Tensor& offsets) {
  return {offsets.narrow(0, 1, offsets.size(0) - 1).to(at::kLong), npu::GroupedMatmul::kPrefixSums};
}

void product_into(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight,
                  const at::Tensor& out) {
  call.launch(npu::Matmul{call.in(x), call.in(columns(weight)), call.out(out),
                          npu::Matmul::kKeepPrecision});
}

at::Tensor single_product(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight) {
  at::Tensor out = rows_out(x, weight, at::kFloat);
  product_into(call, x, weight, out);
  return out;
}

at::Tensor product(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight) {
  const bool alike = x.scalar_type() == weight.scalar_type();
  return alike ? single_product(call, x, weight)
               : single_product(call, x.to(at::kFloat), weight.to(at::kFloat));
}

void grouped_product(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight,
                     const Groups& groups, const at::Tensor& out, const Scales& scales) {
  const auto listed = [&call](const at::Tensor& scale) {
    return scale.defined() ? call.list(scale) : npu::InList();
  };
  call.launch(npu::GroupedMatmul{call.list(x.contiguous()),
                                 call.list(columns(weight)),
                                 {},
                                 listed(scales.weight),
                                 {},
                                 {},
                                 {},
                                 listed(scales.x),
                                 call.maybe(&groups.list),
                                 {},
                                 {},
                                 {},
                                 npu::GroupedMatmul::kOneOutput,
                                 npu::GroupedMatmul::kAlongRows,
                                 groups.type,
                                 npu::GroupedMatmul::kNoActivation,
                                 {},
                                 call.out_list(out),
                                 {},
                                 {}});
}

void paired_product(const NpuCall& call, const at::Tensor& x, const at::Tensor& first_weight,
                    const at::Tensor& second_weight, const at::Tensor& first_out,
                    const at::Tensor& second_out) {
  const at::Tensor rows = x.contiguous();
  const at::Tensor one = columns(first_weight), other = columns(second_weight);
  call.launch(npu::GroupedMatmul{call.list(rows, rows),
                                 call.list(one, other),
                                 {},
                                 {},
                                 {},
                                 {},
                                 {},
                                 {},
                                 {},
                                 {},
                                 {},
                                 {},
                                 npu::GroupedMatmul::kOutputEach,
                                 npu::GroupedMatmul::kApart,
                                 npu::GroupedMatmul::kPrefixSums,
                                 npu::GroupedMatmul::kNoActivation,
                                 {},
                                 call.out_list(first_out, second_out),
                                 {},
                                 {}});
}

void quant_product(const NpuCall& call, const at::Tensor& x, const at::Tensor& weight,
                   const Scales& scales, int64_t group_size, const at::Tensor& out) {
  call.launch(npu::QuantMatmul{call.in(x.contiguous()),
                               call.in(columns(weight)),
                               call.maybe(scales.x.defined() ? &scales.x : nullptr),
                               call.maybe(&scales.weight),
                               {},
                               {},
                               {},
                               {},
                               {},
                               false,
                               false,
                               group_size,
                               call.out(out)});
}

}  // namespace dsv4::bind
