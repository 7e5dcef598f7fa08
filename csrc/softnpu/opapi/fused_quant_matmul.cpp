// npu_quant_matmul of matrices in rows and columns: the limits of
// hicann/ops-nn matmul/quant_batch_matmul_v4/docs/aclnnQuantMatmulV5.md beside its table of dtypes,
// and the formulas.
#include "fused_quant_matmul.h"

#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/round.h>

#include <algorithm>
#include <sstream>

namespace softnpu::quant_matmul {
namespace {

bool is_transposed(In x) { return x.stride(-1) != 1; }

// Sizes in values: 4-bit types lie packed along the dimension without gaps.
std::vector<int64_t> logical_sizes(In x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  const auto type = x.scalar_type();
  sizes[sizes.size() - (is_transposed(x) ? 2 : 1)] *= type == kI32                   ? 8
                                                      : type == kI4 || type == kE2M1 ? 2
                                                                                     : 1;
  return sizes;
}

struct Sizes {
  int64_t m, k, n;
};

// int8 with fp32 or bf16 scales of columns and of tokens: docs/spec/ascend-operators.md 12.2. On
// Ascend 950 the NZ page has no such limit.
bool wide_is_allowed(const Operands& call) {
  if (call.nz && on_a5()) return true;
  const auto scale = call.x2_scale.scalar_type();
  return call.x1.scalar_type() == kI8 && call.x2.scalar_type() == kI8 &&
         (scale == kF32 || scale == kBF16) && call.x2_scale.dim() == 1 && call.x1_scale.defined() &&
         call.x1_scale.dim() == 1;
}

Sizes check_operands(const Operands& call) {
  for (const auto& [name, x] : {std::pair("x1", call.x1), std::pair("x2", call.x2)}) {
    require(x.dim() >= 2 && x.dim() <= 6, name, show(x), "2 to 6 dimensions");
    require(x.is_contiguous() || x.transpose(-1, -2).is_contiguous(), name, show(x),
            "a contiguous tensor, or one whose last two dimensions are exchanged");
    require(x.numel() > 0 || on_a5(), name, show(x), "no empty tensor");
    // The last dimension as it lies in memory: our reading.
    require(wide_is_allowed(call) || x.size(is_transposed(x) ? -2 : -1) <= 65535, name, show(x),
            "a last dimension of at most 65535");
  }
  const bool int4 = call.x1.scalar_type() == kI32 || call.x1.scalar_type() == kI4;
  require(!int4 || !is_transposed(call.x1), "x1", show(call.x1), "no transposed INT4");
  require(!int4 || call.x2.dim() == 2, "x2", show(call.x2), "2 dimensions, as it is INT4");
  const auto a = logical_sizes(call.x1), b = logical_sizes(call.x2);
  const Sizes sizes{a[a.size() - 2], a.back(), b.back()};
  require(b[b.size() - 2] == sizes.k, "x2", show(call.x2), "the last dimension of x1 as K");
  require(sizes.k > 0, "x1", show(call.x1), "K above 0");
  require(call.out->dim() == std::max(call.x1.dim(), call.x2.dim()) &&
              call.out->size(-2) == sizes.m && call.out->size(-1) == sizes.n,
          "out", show(*call.out), ("[..., " + text(sizes.m) + ", " + text(sizes.n) + "]").c_str());
  if (call.bias.defined()) {
    const int64_t rank = call.out->dim();
    const bool row =
        call.bias.dim() == 1 || (call.bias.dim() == 2 && rank == 2 && on_a5()) ||
        (call.bias.dim() == 3 && rank == 3 && !int4 && call.bias.size(0) == call.out->size(0));
    require(row &&
                call.bias.numel() ==
                    call.bias.size(-1) * (call.bias.dim() == 3 ? call.out->size(0) : 1) &&
                call.bias.size(-1) == sizes.n,
            "bias", show(call.bias),
            "[n], [batch, 1, n] for a result of 3 dimensions, on Ascend 950 also [1, n]");
  }
  return sizes;
}

void check_vector(const Operands& call, const Sizes& sizes) {
  const auto one_or = [](In v, int64_t count) {
    return v.dim() == 1 && (v.size(0) == 1 || v.size(0) == count);
  };
  require(call.group == 0, "group_sizes", text(call.group), "0: scales of rank 1 have no groups");
  require(one_or(call.x2_scale, sizes.n), "x2_scale (scale)", show(call.x2_scale), "[1] or [n]");
  if (call.x1_scale.defined()) {
    const bool fp8_tensor = on_a5() && call.x1.element_size() == 1 && call.x1.scalar_type() != kI8;
    require(call.x1_scale.dim() == 1 &&
                (call.x1_scale.size(0) == sizes.m || (fp8_tensor && call.x1_scale.size(0) == 1)),
            "x1_scale (pertoken_scale)", show(call.x1_scale), "[m], or [1] with FLOAT8");
  }
  if (call.x2_offset.defined())
    require(one_or(call.x2_offset, sizes.n), "x2_offset (offset)", show(call.x2_offset),
            "[1] or [n]");
}

// Sizes of the groups, a missing one inferred as the document says: the dimension by the count of
// its scales.
void check_groups(const Operands& call, const Sizes& sizes, const Sizes& scales,
                  const std::vector<Sizes>& allowed) {
  const auto part = [&](int shift, int64_t size, int64_t count) {
    const int64_t given = call.group >> shift & 0xffff;
    return given || count == 0 || size % count ? given : size / count;
  };
  const Sizes found{part(32, sizes.m, scales.m), part(0, sizes.k, scales.k),
                    part(16, sizes.n, scales.n)};
  std::string expected;
  for (const Sizes& a : allowed) {
    if (a.m == found.m && a.n == found.n && a.k == found.k) return;
    expected +=
        (expected.empty() ? "[" : " or [") + text(a.m) + ", " + text(a.n) + ", " + text(a.k) + "]";
  }
  refuse("group_sizes", "[" + text(found.m) + ", " + text(found.n) + ", " + text(found.k) + "]",
         expected);
}

void check_shape(const char* name, In scale, const std::vector<int64_t>& last, size_t batch) {
  const auto sizes = scale.sizes();
  const bool fits =
      sizes.size() == last.size() + batch &&
      std::equal(last.begin(), last.end(), sizes.end() - static_cast<int64_t>(last.size()));
  std::ostringstream expected;
  expected << (batch ? "[batch] + " : "") << at::IntArrayRef(last);
  require(fits, name, show(scale), expected.str().c_str());
}

void check_block(const Operands& call, const Sizes& sizes) {
  const bool int8 = call.x1.scalar_type() == kI8, by_row = call.x1_scale.size(-2) == sizes.m;
  const int64_t rows = by_row ? sizes.m : ceil_div(sizes.m, 128), k = ceil_div(sizes.k, 128),
                n = ceil_div(sizes.n, 128);
  require(by_row || !int8, "x1_scale (pertoken_scale)", show(call.x1_scale),
          "a row of scales for each row of INT8");
  check_shape("x1_scale (pertoken_scale)", call.x1_scale, {rows, k},
              static_cast<size_t>(call.x1.dim() - 2));
  check_shape("x2_scale (scale)", call.x2_scale, {k, n}, static_cast<size_t>(call.x2.dim() - 2));
  check_groups(call, sizes, {rows, k, n},
               by_row ? std::vector<Sizes>{{1, 128, 128}} : std::vector<Sizes>{{128, 128, 128}});
  if (on_a5()) return;
  require(sizes.k % 512 == 0 && !is_transposed(call.x1), "x1", show(call.x1),
          "K a multiple of 512, not transposed");
  require(sizes.n % 256 == 0 && is_transposed(call.x2), "x2", show(call.x2),
          "n a multiple of 256, transposed");
}

void check_mx(const Operands& call, const Sizes& sizes) {
  const int64_t pairs = ceil_div(sizes.k, 64);
  check_shape("x1_scale (pertoken_scale)", call.x1_scale, {sizes.m, pairs, 2},
              static_cast<size_t>(call.x1.dim() - 2));
  check_shape("x2_scale (scale)", call.x2_scale, {pairs, sizes.n, 2},
              static_cast<size_t>(call.x2.dim() - 2));
  const bool fp4 = call.x1.scalar_type() == kE2M1,
             mixed =
                 call.x1.scalar_type() != call.x2.scalar_type() && call.x2.scalar_type() == kE2M1;
  check_groups(call, sizes, {sizes.m, 2 * pairs, sizes.n}, {{1, 32, 1}});
  require(!fp4 || sizes.k > 2, "x1", show(call.x1), "K above 2, as it is FLOAT4");
  if (!mixed) return;
  require(call.x1.dim() == 2 && !is_transposed(call.x1) && sizes.k % 8 == 0, "x1", show(call.x1),
          "[m, K], K a multiple of 8");
  require(call.x2.dim() == 2 && is_transposed(call.x2), "x2", show(call.x2),
          "a transposed [n, K], as x1 is FLOAT8");
  if (call.bias.defined())
    require(call.bias.dim() == 2 && call.bias.scalar_type() == call.out->scalar_type(), "bias",
            show(call.bias), "[1, n] in the dtype of the result");
}

void check_group(const Operands& call, const Sizes& sizes) {
  check_shape("x1_scale (pertoken_scale)", call.x1_scale, {sizes.m, 1}, 0);
  check_shape("x2_scale (scale)", call.x2_scale, {ceil_div(sizes.k, 256), sizes.n}, 0);
  check_shape("x2_offset (offset)", call.x2_offset, {ceil_div(sizes.k, 256), sizes.n}, 0);
  require(call.group == 256, "group_sizes", text(call.group), "[0, 0, 256]");
  require(sizes.k % 1024 == 0, "x1", show(call.x1), "K a multiple of 1024");
  require(sizes.n % 256 == 0 && is_transposed(call.x2), "x2", show(call.x2),
          "n a multiple of 256, transposed");
}

}  // namespace

void Operands::check() const {
  for (const auto& [name, x] : {std::pair("x1", x1), std::pair("x2", x2),
                                std::pair("x2_scale (scale)", x2_scale), std::pair("out", *out)})
    if (!x.defined()) throw Fault(kNnNullptr, std::string("argument '") + name + "' is null");
  require(!y_scale.defined(), "y_scale", show(y_scale), "nothing (T-CG is not emulated)");
  require(!x1_offset.defined() || x1_offset.numel() == 0, "x1_offset", show(x1_offset), "nothing");
  require(!transpose1 && !transpose2, "transposeX1", "true",
          "false (torch_npu sends views; true is not emulated)");
  // The document adds y_offset = 8 * x2 * x2_scale, which belongs to a split of x1 that its formula
  // does not show.
  require(x1.scalar_type() != kI8 || x2.scalar_type() != kI32, "x2", show(x2),
          "no INT4 beside INT8 (not emulated)");
  require(!y_offset.defined() || y_offset.numel() == 0, "y_offset", show(y_offset), "nothing");
  const Form& form = match(*this);
  const Sizes sizes = check_operands(*this);
  switch (form.mode) {
    case Mode::kVector:
      return check_vector(*this, sizes);
    case Mode::kBlock:
      return check_block(*this, sizes);
    case Mode::kMx:
      return check_mx(*this, sizes);
    case Mode::kGroup:
      return check_group(*this, sizes);
  }
}

namespace {

at::Tensor values(In x) {
  switch (x.scalar_type()) {
    case kI32:
    case kI4:
      return int4_values(x);
    case kE2M1:
      return fp4_values(x);
    default:
      return x.to(kF32).to(at::kDouble);  // sums are exact for integers, and free of overflow
  }
}

at::Tensor spread(In scale, int64_t count, int64_t axis, int64_t size) {
  return scale.repeat_interleave(count, axis).slice(axis, 0, size);
}

bool is_packed(In scale) {
  return scale.scalar_type() == at::kLong || scale.scalar_type() == at::kUInt64;
}

at::Tensor scale_values(In scale) {
  if (!is_packed(scale)) return scale.to(kF32);
  return scale.contiguous().view(kF32).slice(-1, 0, std::nullopt,
                                             2);  // the low half; npu_trans_quant_param
}

at::Tensor grouped_product(const Operands& call) {
  at::Tensor a = values(call.x1), b = values(call.x2);
  const int64_t m = a.size(-2), k = a.size(-1), n = b.size(-1);
  at::Tensor s1 = call.x1_scale.to(kF32).to(at::kDouble),
             s2 = call.x2_scale.to(kF32).to(at::kDouble);
  if (call.x1_scale.scalar_type() == kE8M0) {
    s1 = spread(s1.flatten(-2), 32, -1, k);
    s2 = spread(s2.movedim(-1, -2).flatten(-3, -2), 32, -2, k);
  } else if (call.x2_offset.defined()) {
    b = b.sub(spread(call.x2_offset.to(at::kDouble), 256, -2, k));
    s2 = spread(s2, 256, -2, k);
  } else {
    s1 = spread(spread(s1, s1.size(-2) == m ? 1 : 128, -2, m), 128, -1, k);
    s2 = spread(spread(s2, 128, -2, k), 128, -1, n);
  }
  return at::matmul(a.mul(s1), b.mul(s2));
}

at::Tensor product(const Operands& call) {
  if (call.x1_scale.defined() && call.x1_scale.dim() >= 2 && call.x2_scale.dim() >= 2) {
    const at::Tensor y = grouped_product(call);
    return call.bias.defined() ? y.add(call.bias.to(at::kDouble)) : y;
  }
  const bool int32 = call.bias.defined() && call.bias.scalar_type() == kI32;
  at::Tensor sum = at::matmul(values(call.x1), values(call.x2));
  // A fp32 bias of a static FLOAT8 product is added before the scale, as an INT32 one.
  const bool before = int32 || (is_packed(call.x2_scale) && call.bias.defined());
  if (before) sum = sum.add(call.bias.to(at::kDouble));
  if (call.out->scalar_type() == kI32) return sum;
  at::Tensor y = sum.to(kF32).mul(scale_values(call.x2_scale));
  if (call.x1_scale.defined()) y = y.mul(call.x1_scale.unsqueeze(-1));
  if (call.bias.defined() && !before) y = y.add(call.bias.to(kF32));
  if (call.x2_offset.defined()) y = y.add(call.x2_offset);
  return y;
}

}  // namespace

void Operands::run() const {
  if (out->numel() == 0) return;
  const at::Tensor y = product(*this);
  out = out->scalar_type() == kI8 ? at::round(y).clamp(-128, 127) : y;
}

NAMED(aclnnQuantMatmulV5, Operands, all, check, run)

}  // namespace softnpu::quant_matmul
