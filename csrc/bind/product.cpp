#include "cpu/product.h"

#include <array>
#include <tuple>

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

cpu::Stored stored(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return cpu::Stored::f32;
    case at::kBFloat16:
      return cpu::Stored::bf16;
    case at::kHalf:
      return cpu::Stored::f16;
    case at::kFloat8_e4m3fn:
      return cpu::Stored::e4m3;
    default:
      return cpu::Stored::e2m1;
  }
}

const uint8_t* bytes(const at::Tensor& tensor) {
  return static_cast<const uint8_t*>(tensor.const_data_ptr());
}

// x [T, K], with a scale where it is e4m3.
cpu::Activations activations(const at::Tensor& x, const OptionalTensor& scale) {
  cpu::Activations rows{stored(x), x.const_data_ptr(), x.stride(0)};
  if (scale) {
    rows.scale = bytes(*scale);
    rows.scale_row_stride = scale->stride(0);
    rows.scale_block_stride = scale->stride(1);
  }
  return rows;
}

// weight [N, K] or [E, N, K].
cpu::StoredWeight weights(const at::Tensor& weight, const OptionalTensor& scale = std::nullopt) {
  const bool grouped = weight.dim() == 3;
  cpu::StoredWeight result{stored(weight), static_cast<int64_t>(weight.element_size()),
                           weight.const_data_ptr(), grouped ? weight.stride(0) : 0,
                           weight.stride(-2)};
  if (scale) {
    result.scale = bytes(*scale);
    result.scale_expert_stride = grouped ? scale->stride(0) : 0;
    result.scale_row_stride = scale->stride(-2);
    result.scale_block_stride = scale->stride(-1);
  }
  return result;
}

at::ScalarType result_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat8_e4m3fn ? at::kBFloat16 : x.scalar_type();
}

template <Isa isa>
at::Tensor multiply(const at::Tensor& x, const OptionalTensor& x_scale, const at::Tensor& weight,
                    const OptionalTensor& scale, const int32_t* offsets, int64_t experts) {
  const at::Tensor y = new_tensor({x.size(0), weight.size(-2)}, result_dtype(x));
  cpu::product(
      {x.size(0), weight.size(-2), x.size(1), activations(x, x_scale), weights(weight, scale),
       offsets, experts, dtype_of(y), y.mutable_data_ptr(), y.stride(0)},
      isa);
  return y;
}

template <Isa isa>
at::Tensor multiply(const at::Tensor& x, const OptionalTensor& x_scale, const at::Tensor& weight,
                    const OptionalTensor& scale) {
  const std::array<int32_t, 2> offsets{0, static_cast<int32_t>(x.size(0))};
  return multiply<isa>(x, x_scale, weight, scale, offsets.data(), 1);
}

WhyNot not_rows(const at::Tensor& x, const at::Tensor& weight) {
  return first(not_float_rows("x", x), not_float_rows("weight", weight));
}

WhyNot not_grouped_rows(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  if (!offsets.is_contiguous()) return "expert_offsets is not contiguous";
  return not_rows(x, weight);
}

struct Fp8Gemm {
  static WhyNot why_not(const Context&, const at::Tensor& x, const OptionalTensor&,
                        const at::Tensor& weight, const at::Tensor&) {
    return not_rows(x, weight);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const OptionalTensor& x_scale,
                        const at::Tensor& weight, const at::Tensor& scale) {
    return multiply<isa>(x, x_scale, weight, scale);
  }
};

struct QuantisedGroupedGemm {
  static WhyNot why_not(const Context&, const at::Tensor& x, const OptionalTensor&,
                        const at::Tensor& weight, const at::Tensor&, const at::Tensor& offsets) {
    return not_grouped_rows(x, weight, offsets);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const OptionalTensor& x_scale,
                        const at::Tensor& weight, const at::Tensor& scale,
                        const at::Tensor& offsets) {
    return multiply<isa>(x, x_scale, weight, scale, offsets.const_data_ptr<int32_t>(),
                         weight.size(0));
  }
};

struct GroupedGemm {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& offsets) {
    return not_grouped_rows(x, weight, offsets);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
    return multiply<isa>(x, std::nullopt, weight, std::nullopt, offsets.const_data_ptr<int32_t>(),
                         weight.size(0));
  }
};

struct LinearPair {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& first,
                        const at::Tensor& second) {
    return bind::first(not_float_rows("x", x), not_float_rows("first", first),
                       not_float_rows("second", second));
  }

  template <Isa isa>
  static std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& x, const at::Tensor& first,
                                                const at::Tensor& second) {
    return {multiply<isa>(x, std::nullopt, first, std::nullopt),
            multiply<isa>(x, std::nullopt, second, std::nullopt)};
  }
};

struct Linear {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight) {
    return not_rows(x, weight);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight) {
    return multiply<isa>(x, std::nullopt, weight, std::nullopt);
  }
};

struct GroupedOutputProjection {
  static WhyNot why_not(const Context&, const at::Tensor& o, const at::Tensor& wo_a) {
    if (o.scalar_type() != at::kFloat && wo_a.scalar_type() != o.scalar_type()) {
      return "wo_a is rounded to o's dtype first, which only the reference does";
    }
    if (o.size(1) > 1 && o.stride(1) != o.size(2)) return "o's heads are not adjacent";
    return first(not_float_rows("o", o), not_float_rows("wo_a", wo_a));
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& o, const at::Tensor& wo_a) {
    const int64_t groups = wo_a.size(0), rank = wo_a.size(1), k = wo_a.size(2);
    const at::Tensor y = new_tensor({o.size(0), groups * rank}, o.scalar_type());
    const std::array<int32_t, 2> offsets{0, static_cast<int32_t>(o.size(0))};
    auto* results = static_cast<uint8_t*>(y.mutable_data_ptr());
    const int64_t width = static_cast<int64_t>(o.element_size());
    for (int64_t g = 0; g < groups; ++g) {
      cpu::StoredWeight weight = weights(wo_a);
      weight.codes = bytes(wo_a) + g * wo_a.stride(0) * static_cast<int64_t>(wo_a.element_size());
      cpu::product({o.size(0),
                    rank,
                    k,
                    {stored(o), bytes(o) + g * k * width, o.stride(0)},
                    weight,
                    offsets.data(),
                    1,
                    dtype_of(y),
                    results + g * rank * width,
                    y.stride(0)},
                   isa);
    }
    return y;
  }
};

struct LmHead {
  static WhyNot why_not(const Context&, const at::Tensor& x, const at::Tensor& weight) {
    return not_rows(x, weight);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, const at::Tensor& weight) {
    const at::Tensor y = new_tensor({x.size(0), weight.size(0)}, at::kFloat);
    const std::array<int32_t, 2> offsets{0, static_cast<int32_t>(x.size(0))};
    cpu::product(
        {x.size(0), weight.size(0), x.size(1), activations(x, std::nullopt), weights(weight),
         offsets.data(), 1, DType::f32, y.mutable_data_ptr(), y.stride(0)},
        isa);
    return y;
  }
};

const IsaRegistration<Fp8Gemm> fp8_gemm("fp8_gemm");
const IsaRegistration<QuantisedGroupedGemm> fp8_grouped_gemm("fp8_grouped_gemm");
const IsaRegistration<QuantisedGroupedGemm> fp4_grouped_gemm("fp4_grouped_gemm");
const IsaRegistration<GroupedGemm> grouped_gemm("grouped_gemm");
const IsaRegistration<Linear> linear("linear");
const IsaRegistration<LinearPair> linear_pair("linear_pair");
const IsaRegistration<GroupedOutputProjection> grouped_output_projection(
    "grouped_output_projection");
const IsaRegistration<LmHead> lm_head("lm_head");

}  // namespace
}  // namespace dsv4::bind
