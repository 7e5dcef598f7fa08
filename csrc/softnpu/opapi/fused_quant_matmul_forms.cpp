// The tables of dtype combinations of the quantised products, row by row; kNone: the argument is
// null. kForms: the "约束说明" of
// hicann/ops-nn matmul/quant_batch_matmul_v4/docs/aclnnQuantMatmulV5.md.
#include "fused_quant_matmul.h"

namespace softnpu::quant_matmul {
namespace {

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
    {kOnA2A3, Mode::kVector, kInt4Forms, kInt4Forms, {kF32}, {kF32}, kNo,
     {kNone, kI32, kF16, kF32}, {kF16}},
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

// hicann/ops-nn matmul/quant_batch_matmul_v3/docs/aclnnQuantMatmulWeightNz.md; its 4-bit rows are
// not emulated.
const std::vector<Form> kNzForms = {
    // clang-format off
    // A2 and A3
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, kNo, kParameter, kNo, {kNone, kI32}, {kF16}},
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, kNo, kParameter, {kNone, kF32}, {kNone, kI32}, {kI8}},
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, {kNone, kF32}, {kF32, kBF16}, kNo,
     {kNone, kI32, kBF16, kF32}, {kBF16}},
    {kOnA2A3, Mode::kVector, {kI8}, {kI8}, {kF32}, {kF32}, kNo, {kNone, kI32, kF16, kF32}, {kF16}},
    {kEverywhere, Mode::kVector, {kI8}, {kI8}, kNo, {kF32, kBF16}, kNo, {kNone, kI32}, {kI32}},
    // A5: T-C and T-T, K-C and K-T
    {kOnA5, Mode::kVector, {kI8}, {kI8}, kNo, kParameter, kNo, {kNone, kI32}, {kF16, kBF16}},
    {kOnA5, Mode::kVector, {kI8}, {kI8}, kNo, kParameter, {kNone, kF32}, {kNone, kI32}, {kI8}},
    {kOnA5, Mode::kVector, {kI8}, {kI8}, {kNone, kF32}, {kF32, kBF16}, kNo,
     {kNone, kI32, kF32, kBF16}, {kBF16}},
    {kOnA5, Mode::kVector, {kI8}, {kI8}, {kF32}, {kF32}, kNo, {kNone, kI32, kF32, kF16}, {kF16}},
    {kOnA5, Mode::kVector, {kE4M3}, {kE4M3}, kNo, kParameter, kNo, {kNone, kF32}, kWide},
    {kOnA5, Mode::kVector, {kE4M3}, {kE4M3}, {kF32}, {kF32}, kNo, {kNone, kF32}, kWide},
    // A5: G-B and B-B, MX
    {kOnA5, Mode::kBlock, {kE4M3}, {kE4M3}, {kF32}, {kF32}, kNo, kNo, kWide},
    {kOnA5, Mode::kMx, {kE4M3}, {kE4M3}, {kE8M0}, {kE8M0}, kNo, {kNone, kF32}, kWide},
    // clang-format on
};

}  // namespace

const Form& match(const Operands& call) {
  const bool grouped =
      call.x1_scale.defined() && call.x1_scale.dim() >= 2 && call.x2_scale.dim() >= 2;
  std::vector<const Form*> left;
  for (const Form& form : call.nz ? kNzForms : kForms)
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

}  // namespace softnpu::quant_matmul
