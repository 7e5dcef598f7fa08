// Grouped products: npu_grouped_matmul in all its forms. The dtypes are in fused_grouped_forms.cpp,
// the limits in fused_grouped_check.cpp; the formulas are those of the section "计算公式" of
// aclnnGroupedMatmulV5.md.
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
    const int64_t start = end, expert = type == 2 ? data[2 * i] : i,
                  value = data[type == 2 ? 2 * i + 1 : i];
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
  const auto exact =
      at::isIntegralType(x.scalar_type(), false) && at::isIntegralType(weight.scalar_type(), false);
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

at::Tensor element(Ins list, const Grouped& call, int64_t expert) {
  return call.weight.size() == 1 && call.weight[0].dim() == 3 ? list[0][expert]
                                                              : list[static_cast<size_t>(expert)];
}

at::Tensor weight_of(const Grouped& call, int64_t expert) {
  const bool together = call.weight.size() == 1 && call.weight[0].dim() == 3;
  return together ? call.weight[0][expert].read() : call.weight[static_cast<size_t>(expert)].read();
}

// The scale of a static quantisation as the fixed pipe reads it: 19 bits of fp32, and a signed
// offset of 9 bits at 37 (our reading of aclnnTransQuantParam).
at::Tensor pipe_scale(In packed) {
  return packed.view(at::kLong).bitwise_and(0xFFFFE000).contiguous();
}
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

at::Tensor row_scale(const Grouped& call, const Part& part) {
  const at::Tensor scale = call.per_token[0].to(kF32);
  if (call.type == 2)
    return scale.dim() == 2 && scale.size(1) > 1 ? scale[part.index].unsqueeze(-1)
                                                 : scale[part.index];
  if (scale.dim() == 1 && scale.size(0) == call.rows())
    return scale.slice(0, part.start, part.end).unsqueeze(-1);
  return scale[part.expert];
}

at::Tensor scaled(const Grouped& call, const Part& part) {
  at::Tensor y = product(part.x, part.weight);
  const bool whole_bias = given(call.bias) && call.bias[0].scalar_type() == kI32;
  if (whole_bias) y = y.add(element(call.bias, call, part.expert));
  if (call.out[0]->scalar_type() == kI32) return y;
  at::Tensor scale =
      call.type == 2 ? call.scale[0][part.index] : element(call.scale, call, part.expert);
  const bool packed = scale.scalar_type() == at::kLong || scale.scalar_type() == at::kUInt64;
  const at::Tensor values = packed ? low_float(pipe_scale(scale.reshape({-1}))) : scale.to(kF32);
  y = y.to(kF32).mul(values);
  if (call.out[0]->scalar_type() == kI8)
    return at::round(y.add(pipe_offset(scale))).clamp(-128, 127);
  if (given(call.per_token)) y = y.mul(row_scale(call, part));
  return given(call.bias) && !whole_bias ? y.add(element(call.bias, call, part.expert).to(kF32))
                                         : y;
}

// FP8 with scales of blocks: 1 by 128 of x, 128 by 128 of weight. Along K a group's scales begin at
// K / 128 + group.
at::Tensor scaled_blocks(const Grouped& call, const Part& part) {
  const int64_t k = part.x.size(-1), n = part.weight.size(-1);
  at::Tensor rows, blocks;
  if (call.type == 2) {
    const int64_t first = part.start / 128 + part.index, count = ceil_div(k, 128);
    rows = call.per_token[0].narrow(1, first, count);
    blocks = call.scale[0].narrow(0, first, count);
  } else {
    rows = call.per_token[0].slice(0, part.start, part.end);
    blocks = call.scale[0][part.expert];
  }
  return product(part.x.to(kF32).mul(stretch(rows, 128, 1, k)),
                 part.weight.to(kF32).mul(stretch(stretch(blocks, 128, 0, k), 128, 1, n)));
}

at::Tensor mx(const Grouped& call, const Part& part) {
  const int64_t k = part.x.size(-1);
  at::Tensor rows, blocks;
  if (call.type == 2) {
    const int64_t first = part.start / 64 + part.index, count = ceil_div(k, 64);
    rows = mx_rows(call.per_token[0].narrow(1, first, count));
    blocks = mx_columns(call.scale[0].narrow(0, first, count));
  } else {
    rows = mx_rows(call.per_token[0].slice(0, part.start, part.end));
    blocks = mx_columns(element(call.scale, call, part.expert));
  }
  return product(part.x.to(kF32).mul(stretch(rows, 32, 1, k)),
                 part.weight.to(kF32).mul(stretch(blocks, 32, 0, k)));
}

// Sum over parts of K of (x . weight) * scale, each sum of integers exact.
at::Tensor by_parts(In x, In weight, In scale) {
  const int64_t parts = scale.dim() == 2 ? scale.size(0) : 1, length = x.size(-1) / parts;
  at::Tensor sum;
  for (int64_t i = 0; i < parts; ++i) {
    const at::Tensor one =
        product(x.narrow(-1, i * length, length), weight.narrow(0, i * length, length))
            .to(kF32)
            .mul(scale.dim() == 2 ? scale[i] : scale);
    sum = i ? sum.add(one) : one;
  }
  return sum;
}

at::Tensor msd(const Grouped& call, const Part& part) {
  const at::Tensor x = part.x.to(at::kShort);
  at::Tensor y = by_parts(x.sub(8), part.weight, low_float(element(call.scale, call, part.expert)));
  y = y.add(element(call.bias, call, part.expert));
  // The document gives the offset (antiquant offset * scale) but no place in the formula: our
  // reading.
  if (given(call.offset))
    y = y.add(x.to(kF32).sum(-1, true).mul(element(call.offset, call, part.expert)));
  return y.mul(row_scale(call, part));
}

at::Tensor antiquant(const Grouped& call, const Part& part) {
  const int64_t k = part.weight.size(0);
  const auto spread = [k](In scale) {
    return scale.dim() == 2 ? stretch(scale.to(kF32), k / scale.size(0), 0, k) : scale.to(kF32);
  };
  at::Tensor weight = part.weight.to(kF32);
  if (given(call.antiquant_offset))
    weight = weight.add(spread(element(call.antiquant_offset, call, part.expert)));
  return product(part.x, weight.mul(spread(element(call.antiquant_scale, call, part.expert))));
}

at::Tensor mx_w4(const Grouped& call, const Part& part) {
  const int64_t k = part.x.size(-1);
  const at::Tensor rows = mx_rows(call.per_token[0].slice(0, part.start, part.end));
  at::Tensor scale = element(call.antiquant_scale, call, part.expert);
  if (scale.size(0) == part.weight.size(1) && scale.size(1) == k / 64)
    scale = scale.transpose(0, 1);
  return product(part.x.to(kF32).mul(stretch(rows, 32, 1, k)),
                 part.weight.to(kF32).mul(stretch(mx_columns(scale), 32, 0, k)));
}

at::Tensor kcg(const Grouped& call, const Part& part) {
  const at::Tensor y = by_parts(part.x, part.weight, call.antiquant_scale[0][part.expert].to(kF32));
  return y.mul(call.scale[0][part.expert]).mul(row_scale(call, part));
}

at::Tensor compute(const Grouped& call, const Form& form, const Part& part) {
  at::Tensor y;
  switch (form.kind) {
    case Kind::kScaled:
      y = blockwise(call) ? scaled_blocks(call, part) : scaled(call, part);
      return activate(y, call.act);  // behind the bias (our reading: the document gives no place)
    case Kind::kMsd:
      return msd(call, part);
    case Kind::kInt4:
      y = by_parts(part.x, part.weight, low_float(call.scale[0][part.expert]));
      return given(call.per_token) ? y.mul(row_scale(call, part)) : y;
    case Kind::kMx:
      y = mx(call, part);
      break;
    case Kind::kAntiquant:
      y = antiquant(call, part);
      break;
    case Kind::kMxW4:
      y = mx_w4(call, part);
      break;
    case Kind::kKcg:
      y = kcg(call, part);
      break;
    default:
      y = product(part.x, part.weight);
  }
  return given(call.bias) ? y.add(element(call.bias, call, part.expert).to(kF32)) : y;
}

void run_apart(const Grouped& call, const Form& form) {
  for (size_t i = 0; i < call.x.size(); ++i) {
    const auto expert = static_cast<int64_t>(i);
    call.out[i] =
        compute(call, form,
                {call.x[i].read(), call.weight[i].read(), expert, expert, 0, call.x[i].size(0)});
  }
}

void run_grouped(const Grouped& call) {
  const Form& form = form_of(call);
  if (call.type == -1) return run_apart(call, form);
  std::vector<at::Tensor> pieces;
  for (const Matrix& x : call.x) pieces.push_back(x.read());
  const at::Tensor& x = pieces[0];  // several have widths of their own
  std::vector<Group> groups;
  if (call.list.defined())
    groups = read_groups(call.list, call.list_type, call.type == 2 ? x.size(1) : call.rows());
  if (call.x.size() > 1) {
    std::vector<Group> given_groups;
    given_groups.swap(groups);
    int64_t end = 0;
    for (size_t i = 0; i < call.x.size(); ++i) {
      groups.push_back({static_cast<int64_t>(i), end, end + call.x[i].size(0)});
      end += call.x[i].size(0);
      if (call.list.defined() && given_groups[i].end != end)
        throw Fault(kKernelFault, "group_list differs from the rows of the x tensors");
    }
  }
  call.out[0].touch();
  for (size_t i = 0; i < groups.size(); ++i) {
    const auto [expert, start, end] = groups[i];
    const auto index = static_cast<int64_t>(i);
    if (call.type == 2) {
      const at::Tensor weight = call.weight[0].read().slice(0, start, end);
      (*call.out[0])[expert]
          .copy_(  // with pairs the result of a group has its own place (our reading)
              compute(call, form, {x.slice(1, start, end), weight, index, expert, start, end}));
    } else if (start < end) {  // rows behind the last group are not written
      const at::Tensor rows = pieces.size() > 1 ? pieces[i] : x.slice(0, start, end);
      call.out[0]
          ->slice(0, start, end)
          .copy_(compute(call, form, {rows, weight_of(call, expert), index, expert, start, end}));
    }
  }
}

}  // namespace

// An int32 of a weight is eight int4, and then one of x is too; in the NZ format an fp32 is eight
// FP4.
Grouped Grouped::opened() const {
  Grouped result = *this;
  const bool packed_x = !weight.empty() && weight[0].dtype == kI32,
             fp4 = !x.empty() && x[0].dtype != kF32;
  for (Matrix& one : result.weight) one = (fp4 && one.nz ? one.opened(kF32, kE2M1) : one).as_int4();
  for (Matrix& one : result.x)
    if (packed_x) one = one.as_int4();
  return result;
}

void Grouped::check() const {
  require(!given(activation) && !given(activation_scale) && !given(activation_offset),
          "activation_input", "a tensor", "nothing (reserved)");
  check_grouped(opened());
}

void Grouped::check_nz() const {
  require(nz(), "weight", "rows and columns", "the NZ format");
  check();
}

void Grouped::run() const { run_grouped(opened()); }

NAMED(aclnnGroupedMatmulV4, Grouped, v4, check, run)
NAMED(aclnnGroupedMatmulV5, Grouped, v5, check, run)
NAMED(aclnnGroupedMatmulWeightNz, Grouped, weight_nz, check_nz, run)

}  // namespace softnpu::grouped
