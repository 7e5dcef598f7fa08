// Grouped products: npu_grouped_matmul in all its forms. The dtypes are in fused_grouped_forms.cpp, the limits in
// fused_grouped_check.cpp; the formulas are those of the section "计算公式" of aclnnGroupedMatmulV5.md.
#include "fused_grouped.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/round.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>

namespace softnpu::grouped {

std::vector<Group> read_groups(In list, int64_t type, int64_t length) {
  const at::Tensor values = list.contiguous();
  const int64_t* data = values.const_data_ptr<int64_t>();
  std::vector<Group> groups;
  int64_t end = 0;
  for (int64_t i = 0; i < values.size(0); ++i) {
    const int64_t start = end, expert = type == 2 ? data[2 * i] : i, value = data[type == 2 ? 2 * i + 1 : i];
    if (value < 0 || value > length - (type == 0 ? 0 : start) || (type == 0 && value < start))
      throw Fault(kKernelFault, "argument 'group_list': " + text(value) + " for group " + text(i) +
                                    " goes beyond the rows of x or falls");
    if (expert < 0 || expert >= values.size(0))
      throw Fault(kKernelFault, "argument 'group_list': there is no group " + text(expert));
    end = type == 0 ? value : start + value;
    groups.push_back({expert, start, end});
  }
  return groups;
}

at::Tensor product(In x, In weight) {
  const auto exact = at::isIntegralType(x.scalar_type(), false) && at::isIntegralType(weight.scalar_type(), false);
  const auto dtype = exact ? at::kDouble : kF32;
  return at::matmul(x.to(dtype), weight.to(dtype));
}

at::Tensor stretch(In scale, int64_t block, int64_t dim, int64_t size) {
  return scale.repeat_interleave(block, dim).narrow(dim, 0, size);
}

at::Tensor mx_rows(In scale) { return scale.to(kF32).flatten(-2); }

at::Tensor mx_columns(In scale) { return scale.to(kF32).transpose(-1, -2).flatten(0, 1); }

at::Tensor low_float(In scale) {
  if (scale.scalar_type() != at::kLong && scale.scalar_type() != at::kUInt64) return scale.to(kF32);
  return scale.contiguous().view(kF32).unflatten(-1, {scale.size(-1), 2}).select(-1, 0);
}

at::Tensor swiglu_of(In both) {
  const auto halves = both.chunk(2, -1);
  return at::silu(halves[0]).mul(halves[1]);
}

namespace {

at::Tensor element(Ins list, const Grouped& c, int64_t expert) {
  return c.weight.size() == 1 && c.weight[0].dim() == 3 ? list[0][expert] : list[static_cast<size_t>(expert)];
}

at::Tensor weight_of(const Grouped& c, int64_t expert) {
  const bool together = c.weight.size() == 1 && c.weight[0].dim() == 3;
  return together ? c.weight[0][expert].read() : c.weight[static_cast<size_t>(expert)].read();
}

// The scale of a static quantisation as the fixed pipe reads it: 19 bits of fp32, and a signed offset of 9 bits at 37
// (our reading of aclnnTransQuantParam).
at::Tensor pipe_scale(In packed) { return packed.view(at::kLong).bitwise_and(0xFFFFE000).contiguous(); }
at::Tensor pipe_offset(In packed) {
  const at::Tensor bits = packed.view(at::kLong).bitwise_right_shift(37).bitwise_and(511);
  return bits.bitwise_xor(256).sub(256).to(kF32);
}

at::Tensor activate(In y, int64_t kind) {
  switch (kind) {
    case 1:
      return at::relu(y);
    case 2:
      return at::gelu(y, "tanh");
    case 4:
      return y.mul(at::sigmoid(y.mul(1.702)));
    case 5:
      return at::silu(y);
    default:
      return y;
  }
}

// Part of x (rows start..end, or columns when grouped along K) with the scales that belong to it.
struct Part {
  at::Tensor x, weight;
  int64_t index, expert, start, end;  // the index counts groups in the order of group_list
};

at::Tensor row_scale(const Grouped& c, const Part& part) {
  const at::Tensor scale = c.per_token[0].to(kF32);
  if (c.type == 2) return scale.dim() == 2 && scale.size(1) > 1 ? scale[part.index].unsqueeze(-1) : scale[part.index];
  if (scale.dim() == 1 && scale.size(0) == c.rows()) return scale.slice(0, part.start, part.end).unsqueeze(-1);
  return scale[part.expert];
}

at::Tensor scaled(const Grouped& c, const Part& part) {
  at::Tensor y = product(part.x, part.weight);
  const bool whole_bias = given(c.bias) && c.bias[0].scalar_type() == kI32;
  if (whole_bias) y = y.add(element(c.bias, c, part.expert));
  if (c.out[0]->scalar_type() == kI32) return y;
  at::Tensor scale = c.type == 2 ? c.scale[0][part.index] : element(c.scale, c, part.expert);
  const bool packed = scale.scalar_type() == at::kLong || scale.scalar_type() == at::kUInt64;
  const at::Tensor values = packed ? low_float(pipe_scale(scale.reshape({-1}))) : scale.to(kF32);
  y = y.to(kF32).mul(values);
  if (c.out[0]->scalar_type() == kI8) return at::round(y.add(pipe_offset(scale))).clamp(-128, 127);
  if (given(c.per_token)) y = y.mul(row_scale(c, part));
  return given(c.bias) && !whole_bias ? y.add(element(c.bias, c, part.expert).to(kF32)) : y;
}

// FP8 with scales of blocks: 1 by 128 of x, 128 by 128 of weight. Along K a group's scales begin at K / 128 + group.
at::Tensor scaled_blocks(const Grouped& c, const Part& part) {
  const int64_t k = part.x.size(-1), n = part.weight.size(-1);
  at::Tensor rows, blocks;
  if (c.type == 2) {
    const int64_t first = part.start / 128 + part.index, count = ceil_div(k, 128);
    rows = c.per_token[0].narrow(1, first, count);
    blocks = c.scale[0].narrow(0, first, count);
  } else {
    rows = c.per_token[0].slice(0, part.start, part.end);
    blocks = c.scale[0][part.expert];
  }
  return product(part.x.to(kF32).mul(stretch(rows, 128, 1, k)),
                 part.weight.to(kF32).mul(stretch(stretch(blocks, 128, 0, k), 128, 1, n)));
}

at::Tensor mx(const Grouped& c, const Part& part) {
  const int64_t k = part.x.size(-1);
  at::Tensor rows, blocks;
  if (c.type == 2) {
    const int64_t first = part.start / 64 + part.index, count = ceil_div(k, 64);
    rows = mx_rows(c.per_token[0].narrow(1, first, count));
    blocks = mx_columns(c.scale[0].narrow(0, first, count));
  } else {
    rows = mx_rows(c.per_token[0].slice(0, part.start, part.end));
    blocks = mx_columns(element(c.scale, c, part.expert));
  }
  return product(part.x.to(kF32).mul(stretch(rows, 32, 1, k)), part.weight.to(kF32).mul(stretch(blocks, 32, 0, k)));
}

// Sum over parts of K of (x . weight) * scale, each sum of integers exact.
at::Tensor by_parts(In x, In weight, In scale) {
  const int64_t parts = scale.dim() == 2 ? scale.size(0) : 1, length = x.size(-1) / parts;
  at::Tensor sum;
  for (int64_t i = 0; i < parts; ++i) {
    const at::Tensor one = product(x.narrow(-1, i * length, length), weight.narrow(0, i * length, length))
                               .to(kF32)
                               .mul(scale.dim() == 2 ? scale[i] : scale);
    sum = i ? sum.add(one) : one;
  }
  return sum;
}

at::Tensor msd(const Grouped& c, const Part& part) {
  const at::Tensor x = part.x.to(at::kShort);
  at::Tensor y = by_parts(x.sub(8), part.weight, low_float(element(c.scale, c, part.expert)));
  y = y.add(element(c.bias, c, part.expert));
  // The document gives the offset (antiquant offset * scale) but no place in the formula: our reading.
  if (given(c.offset)) y = y.add(x.to(kF32).sum(-1, true).mul(element(c.offset, c, part.expert)));
  return y.mul(row_scale(c, part));
}

at::Tensor antiquant(const Grouped& c, const Part& part) {
  const int64_t k = part.weight.size(0);
  const auto spread = [k](In scale) {
    return scale.dim() == 2 ? stretch(scale.to(kF32), k / scale.size(0), 0, k) : scale.to(kF32);
  };
  at::Tensor weight = part.weight.to(kF32);
  if (given(c.antiquant_offset)) weight = weight.add(spread(element(c.antiquant_offset, c, part.expert)));
  return product(part.x, weight.mul(spread(element(c.antiquant_scale, c, part.expert))));
}

at::Tensor mx_w4(const Grouped& c, const Part& part) {
  const int64_t k = part.x.size(-1);
  const at::Tensor rows = mx_rows(c.per_token[0].slice(0, part.start, part.end));
  at::Tensor scale = element(c.antiquant_scale, c, part.expert);
  if (scale.size(0) == part.weight.size(1) && scale.size(1) == k / 64) scale = scale.transpose(0, 1);
  return product(part.x.to(kF32).mul(stretch(rows, 32, 1, k)),
                 part.weight.to(kF32).mul(stretch(mx_columns(scale), 32, 0, k)));
}

at::Tensor kcg(const Grouped& c, const Part& part) {
  const at::Tensor y = by_parts(part.x, part.weight, c.antiquant_scale[0][part.expert].to(kF32));
  return y.mul(c.scale[0][part.expert]).mul(row_scale(c, part));
}

at::Tensor compute(const Grouped& c, const Form& form, const Part& part) {
  at::Tensor y;
  switch (form.kind) {
    case Kind::kScaled:
      y = blockwise(c) ? scaled_blocks(c, part) : scaled(c, part);
      return activate(y, c.act);  // behind the bias (our reading: the document gives no place)
    case Kind::kMsd:
      return msd(c, part);
    case Kind::kInt4:
      y = by_parts(part.x, part.weight, low_float(c.scale[0][part.expert]));
      return given(c.per_token) ? y.mul(row_scale(c, part)) : y;
    case Kind::kMx:
      y = mx(c, part);
      break;
    case Kind::kAntiquant:
      y = antiquant(c, part);
      break;
    case Kind::kMxW4:
      y = mx_w4(c, part);
      break;
    case Kind::kKcg:
      y = kcg(c, part);
      break;
    default:
      y = product(part.x, part.weight);
  }
  return given(c.bias) ? y.add(element(c.bias, c, part.expert).to(kF32)) : y;
}

void run_apart(const Grouped& c, const Form& form) {
  for (size_t i = 0; i < c.x.size(); ++i) {
    const auto expert = static_cast<int64_t>(i);
    c.out[i] = compute(c, form, {c.x[i].read(), c.weight[i].read(), expert, expert, 0, c.x[i].size(0)});
  }
}

}  // namespace

void run_grouped(const Grouped& c) {
  const Form& form = form_of(c);
  if (c.type == -1) return run_apart(c, form);
  std::vector<at::Tensor> pieces;
  for (const Matrix& x : c.x) pieces.push_back(x.read());
  const at::Tensor x = pieces.size() == 1 ? pieces[0] : at::cat(pieces);
  std::vector<Group> groups;
  if (c.list.defined()) groups = read_groups(c.list, c.list_type, x.size(c.type == 2 ? 1 : 0));
  if (c.x.size() > 1) {
    std::vector<Group> given_groups;
    given_groups.swap(groups);
    int64_t end = 0;
    for (size_t i = 0; i < c.x.size(); ++i) {
      groups.push_back({static_cast<int64_t>(i), end, end + c.x[i].size(0)});
      end += c.x[i].size(0);
      if (c.list.defined() && given_groups[i].end != end)
        throw Fault(kKernelFault, "group_list differs from the rows of the x tensors");
    }
  }
  c.out[0].touch();
  for (size_t i = 0; i < groups.size(); ++i) {
    const auto [expert, start, end] = groups[i];
    const auto index = static_cast<int64_t>(i);
    if (c.type == 2) {
      const at::Tensor weight = c.weight[0].read().slice(0, start, end);
      (*c.out[0])[expert].copy_(  // with pairs the result of a group has its own place (our reading)
          compute(c, form, {x.slice(1, start, end), weight, index, expert, start, end}));
    } else if (start < end) {  // rows behind the last group are not written
      c.out[0]
          ->slice(0, start, end)
          .copy_(compute(c, form, {x.slice(0, start, end), weight_of(c, expert), index, expert, start, end}));
    }
  }
}

namespace {

// An int32 of a weight is eight int4, and then one of x is too; in the NZ format an fp32 is eight FP4.
std::vector<Matrix> weights(Matrices x, Matrices weight) {
  std::vector<Matrix> result;
  const bool other = !x.empty() && x[0].dtype != kF32;
  for (const Matrix& one : weight) result.push_back((other && one.nz ? one.opened(kF32, kE2M1) : one).as_int4());
  return result;
}
std::vector<Matrix> inputs(Matrices x, Matrices weight) {
  std::vector<Matrix> result;
  const bool packed = !weight.empty() && weight[0].dtype == kI32;
  for (const Matrix& one : x) result.push_back(packed ? one.as_int4() : one);
  return result;
}

constexpr auto check_v5 = [](Matrices x, Matrices w, Ins bias, Ins scale, Ins offset, Ins aq_scale, Ins aq_offset,
                             Ins per_token, In list, Ins activation, Ins activation_scale, Ins activation_offset,
                             int64_t split, int64_t type, int64_t list_type, int64_t act, Ints tuning, Outs out, Outs,
                             Outs) {
  require(!given(activation) && !given(activation_scale) && !given(activation_offset), "activation_input", "a tensor",
          "nothing (reserved)");
  check_grouped({inputs(x, w), weights(x, w), bias, scale, offset, aq_scale, aq_offset, per_token, list, split, type,
                 list_type, act, tuning, out, !w.empty() && w[0].nz});
};

constexpr auto run_v5 = [](Matrices x, Matrices w, Ins bias, Ins scale, Ins offset, Ins aq_scale, Ins aq_offset,
                           Ins per_token, In list, Ins, Ins, Ins, int64_t split, int64_t type, int64_t list_type,
                           int64_t act, Ints tuning, Outs out, Outs, Outs) {
  run_grouped({inputs(x, w), weights(x, w), bias, scale, offset, aq_scale, aq_offset, per_token, list, split, type,
               list_type, act, tuning, out, w[0].nz});
};

const std::vector<int64_t> kNoTuning;

constexpr auto check_v4 = [](Matrices x, Matrices w, Ins bias, Ins scale, Ins offset, Ins aq_scale, Ins aq_offset,
                             Ins per_token, In list, Ins input, Ins input_scale, Ins input_offset, int64_t split,
                             int64_t type, int64_t list_type, int64_t act, Outs out, Outs feature, Outs quant) {
  check_v5(x, w, bias, scale, offset, aq_scale, aq_offset, per_token, list, input, input_scale, input_offset, split,
           type, list_type, act, kNoTuning, out, feature, quant);
};

constexpr auto check_nz = [](Matrices x, Matrices w, Ins bias, Ins scale, Ins offset, Ins aq_scale, Ins aq_offset,
                             Ins per_token, In list, Ins input, Ins input_scale, Ins input_offset, int64_t split,
                             int64_t type, int64_t list_type, int64_t act, Ints tuning, int64_t, Outs out, Outs feature,
                             Outs quant) {
  require(!w.empty() && w[0].nz, "weight", "rows and columns", "the NZ format");
  check_v5(x, w, bias, scale, offset, aq_scale, aq_offset, per_token, list, input, input_scale, input_offset, split,
           type, list_type, act, tuning, out, feature, quant);
};

}  // namespace

CHECKED(aclnnGroupedMatmulV4, check_v4,
        [](Matrices x, Matrices w, Ins bias, Ins scale, Ins offset, Ins aq_scale, Ins aq_offset, Ins per_token, In list,
           Ins input, Ins input_scale, Ins input_offset, int64_t split, int64_t type, int64_t list_type, int64_t act,
           Outs out, Outs feature, Outs quant) {
          run_v5(x, w, bias, scale, offset, aq_scale, aq_offset, per_token, list, input, input_scale, input_offset,
                 split, type, list_type, act, kNoTuning, out, feature, quant);
        })
CHECKED(aclnnGroupedMatmulV5, check_v5, run_v5)
CHECKED(aclnnGroupedMatmulWeightNz, check_nz,
        [](Matrices x, Matrices w, Ins bias, Ins scale, Ins offset, Ins aq_scale, Ins aq_offset, Ins per_token, In list,
           Ins input, Ins input_scale, Ins input_offset, int64_t split, int64_t type, int64_t list_type, int64_t act,
           Ints tuning, int64_t, Outs out, Outs feature, Outs quant) {
          run_v5(x, w, bias, scale, offset, aq_scale, aq_offset, per_token, list, input, input_scale, input_offset,
                 split, type, list_type, act, tuning, out, feature, quant);
        })

}  // namespace softnpu::grouped
