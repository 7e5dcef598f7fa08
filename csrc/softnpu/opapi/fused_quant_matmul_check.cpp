// What npu_quant_matmul takes. kForms is the table of dtype combinations in the "约束说明" of
// hicann/ops-nn matmul/quant_batch_matmul_v4/docs/aclnnQuantMatmulV5.md, row by row; kNone: the
// argument is null.
#include <algorithm>
#include <sstream>

#include "fused_quant_matmul.h"

namespace softnpu {
namespace {

// kVector: T-C, T-T, K-C and K-T (scales of rank 1); kBlock: G-B and B-B; kMx; kGroup: K-G.
enum class Mode { kVector, kBlock, kMx, kGroup };

struct Form {
  unsigned where;
  Mode mode;
  Types x1, x2, x1_scale, x2_scale, x2_offset, bias, out;
};

const Types kNo = {kNone}, kFp8 = {kE4M3, kE5M2}, kParameter = {at::kLong, at::kUInt64},
            kWide = {kF16, kBF16, kF32};
const Types kInt4Forms = {kI32, kI4};

const std::vector<Form> kForms = {
    // clang-format off
    // A2 and A3: T-C, T-T, K-C, K-T
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, kNo, kParameter, kNo, {kNone, kI32}, {kF16}},
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, kNo, kParameter, {kNone, kF32}, {kNone, kI32}, {kI8}},
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, {kNone, kF32}, {kF32, kBF16}, kNo,
     {kNone, kI32, kBF16, kF32}, {kBF16}},
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, {kF32}, {kF32}, kNo, {kNone, kI32, kF16, kF32}, {kF16}},
    {kOnA2A3, Mode::kVector, kInt4Forms, kInt4Forms, kNo, kParameter, kNo, {kNone, kI32}, {kF16}},
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, kNo, {kF32, kBF16}, kNo, {kNone, kI32}, {kI32}},
    {kOnA2A3, Mode::kVector, kInt4Forms, kInt4Forms, {kF32}, {kF32, kBF16}, kNo,
     {kNone, kI32, kBF16, kF32}, {kBF16}},
    {kOnA2A3, Mode::kVector, kInt4Forms, kInt4Forms, {kF32}, {kF32}, kNo, {kNone, kI32, kF16, kF32},
     {kF16}},
    // A2 and A3: G-B, K-G
    {kOnA2A3, Mode::kBlock, {kI8}, {kI8}, {kF32}, {kF32}, kNo, {kF32}, {kBF16}},
    {kOnA2A3, Mode::kGroup, {kI4}, {kI4}, {kF32}, {kF32}, {kF16}, kNo, {kBF16}},
    // A5: T-C, T-T. A note above that table has no INT32 for x1 and x2, the table has: our reading.
    {kOnA5, Mode::kVector, {kI8}, {kI8}, kNo, kParameter, kNo, {kNone, kI32}, {kF16, kBF16}},
    {kOnA5, Mode::kVector, {kI8}, {kI8}, kNo, kParameter, {kNone, kF32}, {kNone, kI32}, {kI8}},
    {kOnA5, Mode::kVector, {kI8}, {kI8}, kNo, {kF32, kBF16}, kNo, {kNone, kI32, kF32, kBF16},
     {kBF16}},
    {kOnA5, Mode::kVector, {kI8}, {kI8}, kNo, {kF32, kBF16}, kNo, {kNone, kI32}, {kI32}},
    {kOnA5, Mode::kVector, kFp8, kFp8, kNo, kParameter, kNo, {kNone, kF32}, kWide},
    {kOnA5, Mode::kVector, kFp8, kFp8, {kF32}, {kF32}, kNo, {kNone, kF32}, kWide},
    {kOnA5, Mode::kVector, kInt4Forms, kInt4Forms, kNo, kParameter, kNo, {kNone, kI32}, {kF16}},
    // A5: K-C, K-T
    {kOnA5, Mode::kVector, {kI8}, {kI8}, {kF32}, {kF32, kBF16}, kNo, {kNone, kI32, kF32, kBF16},
     {kBF16}},
    {kOnA5, Mode::kVector, {kI8}, {kI8}, {kF32}, {kF32}, kNo, {kNone, kI32, kF32, kF16}, {kF16}},
    {kOnA5, Mode::kVector, {kI4}, {kI4}, {kF32}, {kF32, kBF16}, kNo, {kNone, kI32, kF32, kBF16},
     {kBF16}},
    {kOnA5, Mode::kVector, {kI4}, {kI4}, {kF32}, {kF32}, kNo, {kNone, kI32, kF32, kF16}, {kF16}},
    // A5: G-B and B-B, MX, K-G
    {kOnA5, Mode::kBlock, kFp8, kFp8, {kF32}, {kF32}, kNo, kNo, kWide},
    {kOnA5, Mode::kBlock, {kI8}, {kI8}, {kF32}, {kF32}, kNo, {kF32}, {kBF16}},
    {kOnA5, Mode::kMx, kFp8, kFp8, {kE8M0}, {kE8M0}, kNo, {kNone, kF32}, kWide},
    {kOnA5, Mode::kMx, {kE2M1}, {kE2M1}, {kE8M0}, {kE8M0}, kNo, {kNone, kF32}, kWide},
    {kOnA5, Mode::kMx, {kE4M3}, {kE2M1}, {kE8M0}, {kE8M0}, kNo, {kNone, kBF16, kF16},
     {kBF16, kF16}},
    {kOnA5, Mode::kGroup, {kI4}, {kI4}, {kF32}, {kF32}, {kF16}, kNo, {kBF16, kF16}},
    // clang-format on
};

// The row whose every column holds what was given; otherwise names the first column that no row is
// left for.
const Form& match(const QuantMatmul& call) {
  const bool grouped =
      call.x1_scale.defined() && call.x1_scale.dim() >= 2 && call.x2_scale.dim() >= 2;
  std::vector<const Form*> left;
  for (const Form& form : kForms)
    if (here(form.where) && (form.mode != Mode::kVector) == grouped) left.push_back(&form);
  struct Column {
    const char* name;
    const at::Tensor& found;
    Types Form::* types;
  };
  for (const Column& column :
       std::initializer_list<Column>{{"x1", call.x1, &Form::x1},
                                     {"x2", call.x2, &Form::x2},
                                     {"out", *call.out, &Form::out},
                                     {"x1_scale (pertoken_scale)", call.x1_scale, &Form::x1_scale},
                                     {"x2_scale (scale)", call.x2_scale, &Form::x2_scale},
                                     {"x2_offset (offset)", call.x2_offset, &Form::x2_offset},
                                     {"bias", call.bias, &Form::bias}}) {
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
  sizes[sizes.size() - (is_transposed(x) ? 2 : 1)] *= type == kI32                   ? 8
                                                      : type == kI4 || type == kE2M1 ? 2
                                                                                     : 1;
  return sizes;
}

struct Sizes {
  int64_t m, k, n;
};

Sizes check_operands(const QuantMatmul& call) {
  for (const auto& [name, x] : {std::pair("x1", call.x1), std::pair("x2", call.x2)}) {
    require(x.dim() >= 2 && x.dim() <= 6, name, show(x), "2 to 6 dimensions");
    require(x.is_contiguous() || x.transpose(-1, -2).is_contiguous(), name, show(x),
            "a contiguous tensor, or one whose last two dimensions are exchanged");
    require(x.numel() > 0 || on_a5(), name, show(x), "no empty tensor");
    // The last dimension as it lies in memory: our reading.
    require(x.size(is_transposed(x) ? -2 : -1) <= 65535, name, show(x),
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

void check_vector(const QuantMatmul& call, const Sizes& sizes) {
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
void check_groups(const QuantMatmul& call, const Sizes& sizes, const Sizes& scales,
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

void check_block(const QuantMatmul& call, const Sizes& sizes) {
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

void check_mx(const QuantMatmul& call, const Sizes& sizes) {
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

void check_group(const QuantMatmul& call, const Sizes& sizes) {
  check_shape("x1_scale (pertoken_scale)", call.x1_scale, {sizes.m, 1}, 0);
  check_shape("x2_scale (scale)", call.x2_scale, {ceil_div(sizes.k, 256), sizes.n}, 0);
  check_shape("x2_offset (offset)", call.x2_offset, {ceil_div(sizes.k, 256), sizes.n}, 0);
  require(call.group == 256, "group_sizes", text(call.group), "[0, 0, 256]");
  require(sizes.k % 1024 == 0, "x1", show(call.x1), "K a multiple of 1024");
  require(sizes.n % 256 == 0 && is_transposed(call.x2), "x2", show(call.x2),
          "n a multiple of 256, transposed");
}

}  // namespace

void QuantMatmul::check() const {
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

}  // namespace softnpu
