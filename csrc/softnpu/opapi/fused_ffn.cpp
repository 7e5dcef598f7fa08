// Two products with an activation between, and a quantised product with GELU behind. Tables:
// argument, its tensor, required, dtypes, ranks, source.
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/round.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>

#include "fused_family.h"
#include "matrix.h"

namespace softnpu {
namespace {

at::Tensor activated(In x, const std::string& name) {
  if (name == "relu") return at::relu(x);
  if (name == "gelu") return at::gelu(x);
  if (name == "fastgelu") return x.mul(at::sigmoid(x.mul(1.702)));
  if (name == "silu") return at::silu(x);
  const auto halves = x.chunk(2, -1);  // of the gated ones
  const std::string gate = name == "geglu" ? "gelu" : name == "swiglu" ? "silu" : "relu";
  return activated(halves[0], gate).mul(halves[1]);
}

// UINT64 and INT64 hold the bits of an fp32 number of 19 bits.
at::Tensor dequantising(In scale) {
  if (scale.scalar_type() != at::kLong && scale.scalar_type() != at::kUInt64) return scale.to(kF32);
  const at::Tensor bits = at::bitwise_and(scale.contiguous().view(at::kLong), 0xffffffffLL);
  return bits.to(at::kInt).view(kF32);
}

// mirror-cann/ops-transformer ffn/ffn/docs/aclnnFFNV2.md
struct Ffn {
  at::Tensor x;
  Matrix weight1, weight2;
  std::vector<int64_t> tokens;
  at::Tensor bias1, bias2, scale, offset, deq1, deq2, anti_scale1, anti_scale2, anti_offset1,
      anti_offset2;
  std::string activation;
  int64_t inner_precise;
  bool by_index;
  Out y;
  FIELDS(all, x, weight1, weight2, tokens, bias1, bias2, scale, offset, deq1, deq2, anti_scale1,
         anti_scale2, anti_offset1, anti_offset2, activation, inner_precise, by_index, y)

  bool quantised() const { return deq1.defined(); }
  bool gated() const { return activation.ends_with("glu"); }

  void check_sizes() const {
    const int64_t rank = tokens.empty() ? 2 : 3;
    for (const auto& [name, w] : {std::pair("weight1", weight1), {"weight2", weight2}}) {
      require(w.defined() && w.dim() == rank, name, show(w),
              rank == 3 ? "[experts, K, N], as expertTokens is given" : "[K, N]");
      require(rank == 2 || w.size(0) == static_cast<int64_t>(tokens.size()), name, show(w),
              "an expert for each value of expertTokens");
    }
    require(weight1.size(-2) == x.size(-1), "weight1", show(weight1), "the width of x as K");
    require(weight1.size(-1) == weight2.size(-2) * (gated() ? 2 : 1), "weight1", show(weight1),
            "N as the K of weight2 (twice that where the activation is gated)");
    require(weight2.size(-1) == y->size(-1), "weight2", show(weight2), "N as the width of y");
  }

  void check() const {
    require_generation(kOnA2A3);
    static const std::vector<std::string> names = {"relu",  "gelu",   "fastgelu", "silu",
                                                   "geglu", "swiglu", "reglu"};
    check_table({{"x", x, true, {kF16, kBF16, kI8}, 2, 8, kDocument},
                 {"y", *y, true, kHalves, 2, 8, kDocument}});
    require(std::find(names.begin(), names.end(), activation) != names.end(), "activation",
            activation, "relu, gelu, fastgelu, silu, geglu, swiglu or reglu");
    require(inner_precise == 0 || inner_precise == 1, "innerPrecise", text(inner_precise),
            "0 or 1");
    require(!gated() || (tokens.empty() && x.scalar_type() == kF16), "activation", activation,
            "no gated one with experts or without fp16");
    require((x.scalar_type() == kI8) == quantised(), "deqScale1",
            quantised() ? show(deq1) : "nothing", "scales exactly for an int8 x");
    require(!quantised() || (scale.defined() && deq2.defined()), "scale",
            scale.defined() ? show(scale) : "nothing", "scale and both deqScales for an int8 x");
    check_sizes();
  }

  std::vector<int64_t> counts() const {
    std::vector<int64_t> result = tokens;
    for (size_t i = result.size(); by_index && i-- > 1;) result[i] -= result[i - 1];
    return result;
  }

  struct Layer {
    const Matrix& weight;
    const at::Tensor &bias, &scale, &offset;
  };
  // Weights [K, N] of one expert in fp32, their scale taken in; groups divide K. With fp16 each
  // step is rounded (as torch_npu's own test has it), with bfloat16 the result: our reading.
  static at::Tensor weights(const Layer& layer, int64_t expert, bool experts) {
    const Matrix w = experts ? layer.weight[expert] : layer.weight;
    if (!layer.scale.defined()) return w.read().to(kF32);
    const auto type = layer.scale.scalar_type();
    const auto inside = type == kF16 ? kF16 : kF32;
    at::Tensor values = w.read().to(inside);
    const auto spread = [&](In table) {
      const at::Tensor one = (experts ? table[expert] : table).to(inside);
      if (one.dim() < 2 || one.size(0) == 1) return one;
      return one.repeat_interleave(values.size(0) / one.size(0), 0);
    };
    if (layer.offset.defined()) values = values.add(spread(layer.offset));
    return values.mul(spread(layer.scale)).to(type).to(kF32);
  }
  static at::Tensor product(In rows, const Layer& layer, int64_t expert, bool experts) {
    at::Tensor result = at::matmul(rows, weights(layer, expert, experts));
    if (layer.bias.defined())
      result = result.add((experts ? layer.bias[expert] : layer.bias).to(kF32));
    return result;
  }

  at::Tensor expert_rows(In rows, int64_t expert, bool experts) const {
    const auto of = [&](In table) { return experts && table.dim() == 2 ? table[expert] : table; };
    at::Tensor hidden = product(rows, {weight1, bias1, anti_scale1, anti_offset1}, expert, experts);
    if (quantised()) hidden = hidden.mul(dequantising(of(deq1)));
    hidden = activated(hidden, activation);
    if (quantised()) {
      hidden = hidden.mul(of(scale).to(kF32));
      if (offset.defined()) hidden = hidden.add(of(offset).to(kF32));
      hidden = at::round(hidden).clamp(-128, 127);
    } else {
      hidden = hidden.to(x.scalar_type()).to(kF32);
    }
    const at::Tensor result =
        product(hidden, {weight2, bias2, anti_scale2, anti_offset2}, expert, experts);
    return quantised() ? result.mul(dequantising(of(deq2))) : result;
  }

  void run() const {
    const at::Tensor flat = x.to(kF32).reshape({-1, x.size(-1)});
    if (tokens.empty()) {
      y = expert_rows(flat, 0, false).view(y->sizes());
      return;
    }
    std::vector<at::Tensor> parts;
    int64_t begin = 0, expert = 0;
    for (const int64_t count : counts()) {
      if (count < 0 || begin + count > flat.size(0))
        throw Fault(kNnParameter, "expertTokens: found " + text(begin + count) +
                                      " rows, expected " + text(flat.size(0)));
      parts.push_back(expert_rows(flat.slice(0, begin, begin + count), expert++, true));
      begin += count;
    }
    y = at::cat(parts).view(y->sizes());
  }
};

// mirror-cann/ops-nn matmul/fused_quant_mat_mul/docs/aclnnFusedQuantMatmul.md and
// aclnnFusedQuantMatmulWeightNz.md
struct ProductGelu {
  Matrix x1, x2;
  at::Tensor x1_scale, x2_scale, y_scale, x1_offset, x2_offset, y_offset, bias, x3;
  std::string activation;
  int64_t group_size;
  Out out;
  FIELDS(all, x1, x2, x1_scale, x2_scale, y_scale, x1_offset, x2_offset, y_offset, bias, x3,
         activation, group_size, out)

  Matrix opened(const Matrix& x) const { return x.as_int4(); }

  void check() const {
    require_generation(kOnA2A3);
    require(x1.defined() && (x1.dtype == kI8 || x1.dtype == kI4 || x1.dtype == kI32), "x1",
            show(x1), "int8, INT4 or INT4 in int32");
    require(x2.defined() && x2.dtype == x1.dtype, "x2", show(x2), "the dtype of x1");
    const Types biases = {kI32, kF32, kF16, kBF16};
    check_table({{"x1Scale", x1_scale, true, {kF32}, 1, 1, kDocument},
                 {"x2Scale", x2_scale, true, {kF32, kBF16}, 1, 1, kDocument},
                 {"yScale", y_scale, false, {kNone}, 0, 0, kDocument},
                 {"x1Offset", x1_offset, false, {kNone}, 0, 0, kDocument},
                 {"x2Offset", x2_offset, false, {kNone}, 0, 0, kDocument},
                 {"yOffset", y_offset, false, {kNone}, 0, 0, kDocument},
                 {"bias", bias, false, biases, 1, 3, kDocument},
                 {"x3", x3, false, {kNone}, 0, 0, kDocument},
                 {"out", *out, true, kHalves, 2, 6, kDocument}});
    require(activation == "gelu_tanh" || activation == "gelu_erf", "fusedOpType", activation,
            "gelu_tanh or gelu_erf");
    const Matrix a = opened(x1), b = opened(x2);
    require(a.size(-1) == b.size(-2), "x2", show(x2), "the K of x1");
    require(x1_scale.size(0) == a.size(-2), "x1Scale", show(x1_scale), "[m]");
    require(x2_scale.size(0) == b.size(-1) || x2_scale.size(0) == 1, "x2Scale", show(x2_scale),
            "[n] or [1]");
    require(out->size(-1) == b.size(-1) && out->size(-2) == a.size(-2), "out", show(*out),
            "[..., m, n]");
  }

  void run() const {
    at::Tensor sum =
        at::matmul(opened(x1).read().to(at::kDouble), opened(x2).read().to(at::kDouble));
    const bool whole = bias.defined() && bias.scalar_type() == kI32;
    if (whole) sum = sum.add(bias);
    at::Tensor result = sum.to(kF32).mul(x2_scale.to(kF32)).mul(x1_scale.unsqueeze(-1));
    if (bias.defined() && !whole) result = result.add(bias.to(kF32));
    out = at::gelu(result, activation == "gelu_tanh" ? "tanh" : "none");
  }
};

}  // namespace

NAMED(aclnnFFNV2, Ffn, all, check, run)
NAMED(aclnnFusedQuantMatmul, ProductGelu, all, check, run)
NAMED(aclnnFusedQuantMatmulWeightNz, ProductGelu, all, check, run)

}  // namespace softnpu
