// npu_quant_matmul. kForms is the table of dtype combinations in the "约束说明" of
// hicann/ops-nn matmul/quant_batch_matmul_v4/docs/aclnnQuantMatmulV5.md, row by row; kNone: the argument is null.
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/round.h>

#include <algorithm>
#include <sstream>

#include "fused_quant.h"

namespace softnpu {
namespace {

// kVector: T-C, T-T, K-C and K-T (scales of rank 1); kBlock: G-B and B-B; kMx; kGroup: K-G.
enum class Mode { kVector, kBlock, kMx, kGroup };

struct Form {
  unsigned where;
  Mode mode;
  Types x1, x2, x1_scale, x2_scale, x2_offset, bias, out;
};

const Types kFp8 = {kE4M3, kE5M2}, kParameter = {at::kLong, at::kUInt64}, kWide = {kF16, kBF16, kF32};
const Types kInt4Forms = {kI32, kI4};

const std::vector<Form> kForms = {
    // A2 and A3: T-C, T-T, K-C, K-T
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, {kNone}, kParameter, {kNone}, {kNone, kI32}, {kF16}},
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, {kNone}, kParameter, {kNone, kF32}, {kNone, kI32}, {kI8}},
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, {kNone, kF32}, {kF32, kBF16}, {kNone}, {kNone, kI32, kBF16, kF32}, {kBF16}},
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, {kF32}, {kF32}, {kNone}, {kNone, kI32, kF16, kF32}, {kF16}},
    {kOnA2A3, Mode::kVector, kInt4Forms, kInt4Forms, {kNone}, kParameter, {kNone}, {kNone, kI32}, {kF16}},
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, {kNone}, {kF32, kBF16}, {kNone}, {kNone, kI32}, {kI32}},
    {kOnA2A3,
     Mode::kVector,
     kInt4Forms,
     kInt4Forms,
     {kF32},
     {kF32, kBF16},
     {kNone},
     {kNone, kI32, kBF16, kF32},
     {kBF16}},
    {kOnA2A3, Mode::kVector, kInt4Forms, kInt4Forms, {kF32}, {kF32}, {kNone}, {kNone, kI32, kF16, kF32}, {kF16}},
    // A2 and A3: G-B, K-G
    {kOnA2A3, Mode::kBlock, {kI8}, {kI8}, {kF32}, {kF32}, {kNone}, {kF32}, {kBF16}},
    {kOnA2A3, Mode::kGroup, {kI4}, {kI4}, {kF32}, {kF32}, {kF16}, {kNone}, {kBF16}},
    // A5: T-C, T-T. A note above that table has no INT32 for x1 and x2, the table has: our reading.
    {kOnA5, Mode::kVector, {kI8}, {kI8}, {kNone}, kParameter, {kNone}, {kNone, kI32}, {kF16, kBF16}},
    {kOnA5, Mode::kVector, {kI8}, {kI8}, {kNone}, kParameter, {kNone, kF32}, {kNone, kI32}, {kI8}},
    {kOnA5, Mode::kVector, {kI8}, {kI8}, {kNone}, {kF32, kBF16}, {kNone}, {kNone, kI32, kF32, kBF16}, {kBF16}},
    {kOnA5, Mode::kVector, {kI8}, {kI8}, {kNone}, {kF32, kBF16}, {kNone}, {kNone, kI32}, {kI32}},
    {kOnA5, Mode::kVector, kFp8, kFp8, {kNone}, kParameter, {kNone}, {kNone, kF32}, kWide},
    {kOnA5, Mode::kVector, kFp8, kFp8, {kF32}, {kF32}, {kNone}, {kNone, kF32}, kWide},
    {kOnA5, Mode::kVector, kInt4Forms, kInt4Forms, {kNone}, kParameter, {kNone}, {kNone, kI32}, {kF16}},
    // A5: K-C, K-T
    {kOnA5, Mode::kVector, {kI8}, {kI8}, {kF32}, {kF32, kBF16}, {kNone}, {kNone, kI32, kF32, kBF16}, {kBF16}},
    {kOnA5, Mode::kVector, {kI8}, {kI8}, {kF32}, {kF32}, {kNone}, {kNone, kI32, kF32, kF16}, {kF16}},
    {kOnA5, Mode::kVector, {kI4}, {kI4}, {kF32}, {kF32, kBF16}, {kNone}, {kNone, kI32, kF32, kBF16}, {kBF16}},
    {kOnA5, Mode::kVector, {kI4}, {kI4}, {kF32}, {kF32}, {kNone}, {kNone, kI32, kF32, kF16}, {kF16}},
    // A5: G-B and B-B, MX, K-G
    {kOnA5, Mode::kBlock, kFp8, kFp8, {kF32}, {kF32}, {kNone}, {kNone}, kWide},
    {kOnA5, Mode::kBlock, {kI8}, {kI8}, {kF32}, {kF32}, {kNone}, {kF32}, {kBF16}},
    {kOnA5, Mode::kMx, kFp8, kFp8, {kE8M0}, {kE8M0}, {kNone}, {kNone, kF32}, kWide},
    {kOnA5, Mode::kMx, {kE2M1}, {kE2M1}, {kE8M0}, {kE8M0}, {kNone}, {kNone, kF32}, kWide},
    {kOnA5, Mode::kMx, {kE4M3}, {kE2M1}, {kE8M0}, {kE8M0}, {kNone}, {kNone, kBF16, kF16}, {kBF16, kF16}},
    {kOnA5, Mode::kGroup, {kI4}, {kI4}, {kF32}, {kF32}, {kF16}, {kNone}, {kBF16, kF16}},
};

struct Operands {
  at::Tensor x1, x2, x1_scale, x2_scale, x2_offset, bias;
  int64_t group;
  Out out;
};

// The row whose every column holds what was given; otherwise names the first column that no row is left for.
const Form& match(const Operands& c) {
  const bool grouped = c.x1_scale.defined() && c.x1_scale.dim() >= 2 && c.x2_scale.dim() >= 2;
  std::vector<const Form*> left;
  for (const Form& form : kForms)
    if (here(form.where) && (form.mode != Mode::kVector) == grouped) left.push_back(&form);
  struct Column {
    const char* name;
    const at::Tensor& found;
    Types Form::* types;
  };
  for (const Column& column : std::initializer_list<Column>{{"x1", c.x1, &Form::x1},
                                                            {"x2", c.x2, &Form::x2},
                                                            {"out", *c.out, &Form::out},
                                                            {"x1_scale (pertoken_scale)", c.x1_scale, &Form::x1_scale},
                                                            {"x2_scale (scale)", c.x2_scale, &Form::x2_scale},
                                                            {"x2_offset (offset)", c.x2_offset, &Form::x2_offset},
                                                            {"bias", c.bias, &Form::bias}}) {
    const auto type = column.found.defined() ? column.found.scalar_type() : kNone;
    narrow(left, column.name, type, show(column.found), column.types);
  }
  return *left.front();
}

bool is_transposed(In x) { return x.stride(-1) != 1; }

// Sizes in values: 4-bit types lie packed along the dimension without gaps.
std::vector<int64_t> logical_sizes(In x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  const auto type = x.scalar_type();
  sizes[sizes.size() - (is_transposed(x) ? 2 : 1)] *= type == kI32 ? 8 : type == kI4 || type == kE2M1 ? 2 : 1;
  return sizes;
}

struct Sizes {
  int64_t m, k, n;
};

Sizes check_operands(const Operands& c) {
  for (const auto& [name, x] : {std::pair("x1", c.x1), std::pair("x2", c.x2)}) {
    require(x.dim() >= 2 && x.dim() <= 6, name, show(x), "2 to 6 dimensions");
    require(x.is_contiguous() || x.transpose(-1, -2).is_contiguous(), name, show(x),
            "a contiguous tensor, or one whose last two dimensions are exchanged");
    require(x.numel() > 0 || on_a5(), name, show(x), "no empty tensor");
    // The last dimension as it lies in memory: our reading.
    require(x.size(is_transposed(x) ? -2 : -1) <= 65535, name, show(x), "a last dimension of at most 65535");
  }
  const bool int4 = c.x1.scalar_type() == kI32 || c.x1.scalar_type() == kI4;
  require(!int4 || !is_transposed(c.x1), "x1", show(c.x1), "no transposed INT4");
  require(!int4 || c.x2.dim() == 2, "x2", show(c.x2), "2 dimensions, as it is INT4");
  const auto a = logical_sizes(c.x1), b = logical_sizes(c.x2);
  const Sizes s{a[a.size() - 2], a.back(), b.back()};
  require(b[b.size() - 2] == s.k, "x2", show(c.x2), "the last dimension of x1 as K");
  require(s.k > 0, "x1", show(c.x1), "K above 0");
  require(c.out->dim() == std::max(c.x1.dim(), c.x2.dim()) && c.out->size(-2) == s.m && c.out->size(-1) == s.n, "out",
          show(*c.out), ("[..., " + text(s.m) + ", " + text(s.n) + "]").c_str());
  if (c.bias.defined()) {
    const int64_t rank = c.out->dim();
    const bool row = c.bias.dim() == 1 || (c.bias.dim() == 2 && rank == 2 && on_a5()) ||
                     (c.bias.dim() == 3 && rank == 3 && !int4 && c.bias.size(0) == c.out->size(0));
    require(
        row && c.bias.numel() == c.bias.size(-1) * (c.bias.dim() == 3 ? c.out->size(0) : 1) && c.bias.size(-1) == s.n,
        "bias", show(c.bias), "[n], [batch, 1, n] for a result of 3 dimensions, on Ascend 950 also [1, n]");
  }
  return s;
}

void check_vector(const Operands& c, const Sizes& s) {
  const auto one_or = [](In v, int64_t count) { return v.dim() == 1 && (v.size(0) == 1 || v.size(0) == count); };
  require(c.group == 0, "group_sizes", text(c.group), "0: scales of rank 1 have no groups");
  require(one_or(c.x2_scale, s.n), "x2_scale (scale)", show(c.x2_scale), "[1] or [n]");
  if (c.x1_scale.defined()) {
    const bool fp8_tensor = on_a5() && c.x1.element_size() == 1 && c.x1.scalar_type() != kI8;
    require(c.x1_scale.dim() == 1 && (c.x1_scale.size(0) == s.m || (fp8_tensor && c.x1_scale.size(0) == 1)),
            "x1_scale (pertoken_scale)", show(c.x1_scale), "[m], or [1] with FLOAT8");
  }
  if (c.x2_offset.defined()) require(one_or(c.x2_offset, s.n), "x2_offset (offset)", show(c.x2_offset), "[1] or [n]");
}

// Sizes of the groups, a missing one inferred as the document says: the dimension by the count of its scales.
void check_groups(const Operands& c, const Sizes& s, const Sizes& scales, const std::vector<Sizes>& allowed) {
  const auto part = [&](int shift, int64_t size, int64_t count) {
    const int64_t given = c.group >> shift & 0xffff;
    return given || count == 0 || size % count ? given : size / count;
  };
  const Sizes found{part(32, s.m, scales.m), part(0, s.k, scales.k), part(16, s.n, scales.n)};
  std::string expected;
  for (const Sizes& a : allowed) {
    if (a.m == found.m && a.n == found.n && a.k == found.k) return;
    expected += (expected.empty() ? "[" : " or [") + text(a.m) + ", " + text(a.n) + ", " + text(a.k) + "]";
  }
  refuse("group_sizes", "[" + text(found.m) + ", " + text(found.n) + ", " + text(found.k) + "]", expected);
}

void check_shape(const char* name, In scale, const std::vector<int64_t>& last, size_t batch) {
  const auto sizes = scale.sizes();
  const bool fits = sizes.size() == last.size() + batch &&
                    std::equal(last.begin(), last.end(), sizes.end() - static_cast<int64_t>(last.size()));
  std::ostringstream expected;
  expected << (batch ? "[batch] + " : "") << at::IntArrayRef(last);
  require(fits, name, show(scale), expected.str().c_str());
}

void check_block(const Operands& c, const Sizes& s) {
  const bool int8 = c.x1.scalar_type() == kI8, by_row = c.x1_scale.size(-2) == s.m;
  const int64_t rows = by_row ? s.m : ceil_div(s.m, 128), k = ceil_div(s.k, 128), n = ceil_div(s.n, 128);
  require(by_row || !int8, "x1_scale (pertoken_scale)", show(c.x1_scale), "a row of scales for each row of INT8");
  check_shape("x1_scale (pertoken_scale)", c.x1_scale, {rows, k}, static_cast<size_t>(c.x1.dim() - 2));
  check_shape("x2_scale (scale)", c.x2_scale, {k, n}, static_cast<size_t>(c.x2.dim() - 2));
  check_groups(c, s, {rows, k, n}, by_row ? std::vector<Sizes>{{1, 128, 128}} : std::vector<Sizes>{{128, 128, 128}});
  if (on_a5()) return;
  require(s.k % 512 == 0 && !is_transposed(c.x1), "x1", show(c.x1), "K a multiple of 512, not transposed");
  require(s.n % 256 == 0 && is_transposed(c.x2), "x2", show(c.x2), "n a multiple of 256, transposed");
}

void check_mx(const Operands& c, const Sizes& s) {
  const int64_t pairs = ceil_div(s.k, 64);
  check_shape("x1_scale (pertoken_scale)", c.x1_scale, {s.m, pairs, 2}, static_cast<size_t>(c.x1.dim() - 2));
  check_shape("x2_scale (scale)", c.x2_scale, {pairs, s.n, 2}, static_cast<size_t>(c.x2.dim() - 2));
  const bool fp4 = c.x1.scalar_type() == kE2M1,
             mixed = c.x1.scalar_type() != c.x2.scalar_type() && c.x2.scalar_type() == kE2M1;
  check_groups(c, s, {s.m, 2 * pairs, s.n}, {{1, 32, 1}});
  require(!fp4 || s.k > 2, "x1", show(c.x1), "K above 2, as it is FLOAT4");
  if (!mixed) return;
  require(c.x1.dim() == 2 && !is_transposed(c.x1) && s.k % 8 == 0, "x1", show(c.x1), "[m, K], K a multiple of 8");
  require(c.x2.dim() == 2 && is_transposed(c.x2), "x2", show(c.x2), "a transposed [n, K], as x1 is FLOAT8");
  if (c.bias.defined())
    require(c.bias.dim() == 2 && c.bias.scalar_type() == c.out->scalar_type(), "bias", show(c.bias),
            "[1, n] in the dtype of the result");
}

void check_group(const Operands& c, const Sizes& s) {
  check_shape("x1_scale (pertoken_scale)", c.x1_scale, {s.m, 1}, 0);
  check_shape("x2_scale (scale)", c.x2_scale, {ceil_div(s.k, 256), s.n}, 0);
  check_shape("x2_offset (offset)", c.x2_offset, {ceil_div(s.k, 256), s.n}, 0);
  require(c.group == 256, "group_sizes", text(c.group), "[0, 0, 256]");
  require(s.k % 1024 == 0, "x1", show(c.x1), "K a multiple of 1024");
  require(s.n % 256 == 0 && is_transposed(c.x2), "x2", show(c.x2), "n a multiple of 256, transposed");
}

void check(const Operands& c, In y_scale, In x1_offset, In y_offset, bool transpose1, bool transpose2) {
  for (const auto& [name, x] : {std::pair("x1", c.x1), std::pair("x2", c.x2), std::pair("x2_scale (scale)", c.x2_scale),
                                std::pair("out", *c.out)})
    if (!x.defined()) throw Fault(kNnNullptr, std::string("argument '") + name + "' is null");
  require(!y_scale.defined(), "y_scale", show(y_scale), "nothing (T-CG is not emulated)");
  require(!x1_offset.defined() || x1_offset.numel() == 0, "x1_offset", show(x1_offset), "nothing");
  require(!transpose1 && !transpose2, "transposeX1", "true", "false (torch_npu sends views; true is not emulated)");
  // The document adds y_offset = 8 * x2 * x2_scale, which belongs to a split of x1 that its formula does not show.
  require(c.x1.scalar_type() != kI8 || c.x2.scalar_type() != kI32, "x2", show(c.x2),
          "no INT4 beside INT8 (not emulated)");
  require(!y_offset.defined() || y_offset.numel() == 0, "y_offset", show(y_offset), "nothing");
  const Form& form = match(c);
  const Sizes s = check_operands(c);
  switch (form.mode) {
    case Mode::kVector:
      return check_vector(c, s);
    case Mode::kBlock:
      return check_block(c, s);
    case Mode::kMx:
      return check_mx(c, s);
    case Mode::kGroup:
      return check_group(c, s);
  }
}

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

bool is_packed(In scale) { return scale.scalar_type() == at::kLong || scale.scalar_type() == at::kUInt64; }

at::Tensor scale_values(In scale) {
  if (!is_packed(scale)) return scale.to(kF32);
  return scale.contiguous().view(kF32).slice(-1, 0, std::nullopt, 2);  // the low half; npu_trans_quant_param
}

at::Tensor grouped_product(const Operands& c) {
  at::Tensor a = values(c.x1), b = values(c.x2);
  const int64_t m = a.size(-2), k = a.size(-1), n = b.size(-1);
  at::Tensor s1 = c.x1_scale.to(kF32).to(at::kDouble), s2 = c.x2_scale.to(kF32).to(at::kDouble);
  if (c.x1_scale.scalar_type() == kE8M0) {
    s1 = spread(s1.flatten(-2), 32, -1, k);
    s2 = spread(s2.movedim(-1, -2).flatten(-3, -2), 32, -2, k);
  } else if (c.x2_offset.defined()) {
    b = b.sub(spread(c.x2_offset.to(at::kDouble), 256, -2, k));
    s2 = spread(s2, 256, -2, k);
  } else {
    s1 = spread(spread(s1, s1.size(-2) == m ? 1 : 128, -2, m), 128, -1, k);
    s2 = spread(spread(s2, 128, -2, k), 128, -1, n);
  }
  return at::matmul(a.mul(s1), b.mul(s2));
}

at::Tensor product(const Operands& c) {
  if (c.x1_scale.defined() && c.x1_scale.dim() >= 2 && c.x2_scale.dim() >= 2) {
    const at::Tensor y = grouped_product(c);
    return c.bias.defined() ? y.add(c.bias.to(at::kDouble)) : y;
  }
  const bool int32 = c.bias.defined() && c.bias.scalar_type() == kI32;
  at::Tensor sum = at::matmul(values(c.x1), values(c.x2));
  // A fp32 bias of a static FLOAT8 product is added before the scale, as an INT32 one.
  const bool before = int32 || (is_packed(c.x2_scale) && c.bias.defined());
  if (before) sum = sum.add(c.bias.to(at::kDouble));
  if (c.out->scalar_type() == kI32) return sum;
  at::Tensor y = sum.to(kF32).mul(scale_values(c.x2_scale));
  if (c.x1_scale.defined()) y = y.mul(c.x1_scale.unsqueeze(-1));
  if (c.bias.defined() && !before) y = y.add(c.bias.to(kF32));
  if (c.x2_offset.defined()) y = y.add(c.x2_offset);
  return y;
}

constexpr auto check_v5 = [](In x1, In x2, In s1, In s2, In y_scale, In x1_offset, In x2_offset, In y_offset, In bias,
                             bool t1, bool t2, int64_t group, Out o) {
  check({x1, x2, s1, s2, x2_offset, bias, group, o}, y_scale, x1_offset, y_offset, t1, t2);
};

}  // namespace

CHECKED(aclnnQuantMatmulV5, check_v5,
        [](In x1, In x2, In s1, In s2, In, In, In x2_offset, In, In bias, bool, bool, int64_t group, Out o) {
          if (o->numel() == 0) return;
          const at::Tensor y = product({x1, x2, s1, s2, x2_offset, bias, group, o});
          o = o->scalar_type() == kI8 ? at::round(y).clamp(-128, 127) : y;
        })

}  // namespace softnpu
