// Which combinations of dtypes grouped_matmul has on which chip: the tables of its documents, row
// by row. mirror-cann ops-transformer: gmm/grouped_matmul/docs/aclnnGroupedMatmulV5.md (rows and
// columns; V4 says the same), gmm/grouped_matmul/docs/aclnnGroupedMatmulWeightNz.md (the NZ
// format).
#include "fused_grouped.h"

namespace softnpu::grouped {
namespace {

constexpr unsigned kOnA23 = kOnA2 | kOnA3, kBoth = kNd | kNz, kAnyAxis = kApart | kRows | kDepth;
const Types kNo = {kNone};
// aclnn takes INT64 for UINT64 on every chip, as torch has int64 tensors (A2's document names
// UINT64 only: our reading).
const Types k64 = {at::kUInt64, at::kLong};
const Types kAny8 = {kE4M3, kE5M2};
const Types kWide = {kBF16, kF16, kF32};

// Columns: source, chips, layouts of weight, group types, kind, x, weight, bias, scale, offset,
// antiquant_scale, antiquant_offset, per_token_scale, out. An int32 weight (x) is eight int4, and
// is found as int4 here; an fp32 weight beside another x is eight FP4.
const std::vector<Form> kForms = {
    // clang-format off
    // A2, A3: A8W8
    {kDocument, kOnA23, kNd, kRows, Kind::kScaled, {kI8}, {kI8}, {kI32, kNone}, k64, kNo, kNo, kNo,
     kNo, {kI8}},
    {kDocument, kOnA23, kBoth, kRows, Kind::kScaled, {kI8}, {kI8}, {kI32, kNone}, {kBF16}, kNo, kNo,
     kNo, {kF32, kNone}, {kBF16}},
    {kDocument, kOnA23, kNz, kRows, Kind::kScaled, {kI8}, {kI8}, {kBF16, kNone}, {kF32, kBF16}, kNo,
     kNo, kNo, {kF32, kNone}, {kBF16}},
    {kDocument, kOnA23, kBoth, kRows, Kind::kScaled, {kI8}, {kI8}, {kI32, kNone}, {kF32}, kNo, kNo,
     kNo, {kF32, kNone}, {kF16}},
    {kDocument, kOnA23, kBoth, kRows, Kind::kScaled, {kI8}, {kI8}, {kI32, kNone}, kNo, kNo, kNo,
     kNo, kNo, {kI32}},
    // A8W4
    {kDocument, kOnA23, kBoth, kRows, Kind::kMsd, {kI8}, {kI4}, {kF32}, k64, kNo, kNo, kNo, {kF32},
     {kBF16}},
    {kDocument, kOnA23, kBoth, kRows, Kind::kMsd, {kI8}, {kI4}, {kF32}, k64, {kF32, kNone}, kNo,
     kNo, {kF32}, {kF16}},
    // A16W4 and A16W8; that the offset may be absent (symmetric quantisation) is our reading
    {kReading, kOnA23, kNd, kApart | kRows, Kind::kAntiquant, {kF16}, {kI4, kI8}, {kF16, kNone},
     kNo, kNo, {kF16}, {kF16, kNone}, kNo, {kF16}},
    {kReading, kOnA23, kNd, kApart | kRows, Kind::kAntiquant, {kBF16}, {kI4, kI8}, {kF32, kNone},
     kNo, kNo, {kBF16}, {kBF16, kNone}, kNo, {kBF16}},
    // A4W4
    {kDocument, kOnA23, kBoth, kRows, Kind::kInt4, {kI4}, {kI4}, kNo, k64, kNo, kNo, kNo,
     {kF32, kNone}, {kF16, kBF16}},
    // not quantised
    {kDocument, kOnA23, kNd, kAnyAxis, Kind::kPlain, {kF32}, {kF32}, {kF32, kNone}, kNo, kNo, kNo,
     kNo, kNo, {kF32}},
    {kDocument, kOnA23, kBoth, kAnyAxis, Kind::kPlain, {kF16}, {kF16}, {kF16, kNone}, kNo, kNo, kNo,
     kNo, kNo, {kF16}},
    {kDocument, kOnA23, kBoth, kAnyAxis, Kind::kPlain, {kBF16}, {kBF16}, {kF32, kNone}, kNo, kNo,
     kNo, kNo, kNo, {kBF16}},
    // A5: static quantisation, and dynamic where per_token_scale is given
    {kDocument, kOnA5, kNd, kRows, Kind::kScaled, {kI8}, {kI8}, {kI32, kNone}, k64, kNo, kNo, kNo,
     kNo, {kBF16, kF16, kI8}},
    {kDocument, kOnA5, kNz, kRows, Kind::kScaled, {kI8}, {kI8}, {kI32, kNone}, k64, kNo, kNo, kNo,
     kNo, {kBF16, kF16}},
    {kDocument, kOnA5, kBoth, kRows, Kind::kScaled, {kI8}, {kI8}, {kI32, kNone},
     {kNone, at::kUInt64, at::kLong}, kNo, kNo, kNo, kNo, {kI32}},
    {kDocument, kOnA5, kBoth, kRows, Kind::kScaled, {kI8}, {kI8}, {kI32, kBF16, kF32, kNone},
     {kBF16, kF32}, kNo, kNo, kNo, {kF32, kNone}, {kBF16}},
    {kDocument, kOnA5, kBoth, kRows, Kind::kScaled, {kI8}, {kI8}, {kI32, kF16, kF32, kNone}, {kF32},
     kNo, kNo, kNo, {kF32, kNone}, {kF16}},
    {kDocument, kOnA5, kNd, kRows, Kind::kScaled, kAny8, kAny8, kNo, k64, kNo, kNo, kNo, kNo,
     kWide},
    {kDocument, kOnA5, kNd, kRows | kDepth, Kind::kScaled, kAny8, kAny8, kNo, {kF32}, kNo, kNo, kNo,
     {kF32, kNone}, kWide},
    // MX
    {kDocument, kOnA5, kNd, kRows | kDepth, Kind::kMx, kAny8, kAny8, kNo, {kE8M0}, kNo, kNo, kNo,
     {kE8M0}, kWide},
    {kDocument, kOnA5, kNz, kRows, Kind::kMx, {kE4M3}, {kE4M3}, kNo, {kE8M0}, kNo, kNo, kNo,
     {kE8M0}, kWide},
    {kDocument, kOnA5, kBoth, kRows, Kind::kMx, {kE2M1}, {kE2M1}, {kF32, kNone}, {kE8M0}, kNo, kNo,
     kNo, {kE8M0}, kWide},
    // not quantised
    {kDocument, kOnA5, kNd, kAnyAxis, Kind::kPlain, {kF32}, {kF32}, {kF32, kNone}, kNo, kNo, kNo,
     kNo, kNo, {kF32}},
    {kDocument, kOnA5, kNd, kAnyAxis, Kind::kPlain, {kF16}, {kF16}, {kF16, kF32, kNone}, kNo, kNo,
     kNo, kNo, kNo, {kF16}},
    {kDocument, kOnA5, kNd, kAnyAxis, Kind::kPlain, {kBF16}, {kBF16}, {kBF16, kF32, kNone}, kNo,
     kNo, kNo, kNo, kNo, {kBF16}},
    {kDocument, kOnA5, kNz, kApart | kRows, Kind::kPlain, {kF16}, {kF16}, {kF16, kF32, kNone}, kNo,
     kNo, kNo, kNo, kNo, {kF16}},
    {kDocument, kOnA5, kNz, kApart | kRows, Kind::kPlain, {kBF16}, {kBF16}, {kBF16, kF32, kNone},
     kNo, kNo, kNo, kNo, kNo, {kBF16}},
    // a quantised weight only
    {kDocument, kOnA5, kNd, kApart | kRows, Kind::kAntiquant, {kBF16}, {kI8, kI4},
     {kBF16, kF32, kNone}, kNo, kNo, {kBF16}, {kBF16, kNone}, kNo, {kBF16}},
    {kDocument, kOnA5, kNd, kApart | kRows, Kind::kAntiquant, {kF16}, {kI8, kI4}, {kF16, kNone},
     kNo, kNo, {kF16}, {kF16, kNone}, kNo, {kF16}},
    {kDocument, kOnA5, kNd, kRows, Kind::kAntiquant, {kBF16}, kAny8, {kBF16, kF32, kNone}, kNo, kNo,
     {kBF16}, kNo, kNo, {kBF16}},
    {kDocument, kOnA5, kNd, kRows, Kind::kAntiquant, {kF16}, kAny8, {kF16, kNone}, kNo, kNo, {kF16},
     kNo, kNo, {kF16}},
    {kDocument, kOnA5, kNz, kRows, Kind::kAntiquant, {kBF16}, {kE2M1}, {kBF16, kF32, kNone}, kNo,
     kNo, {kE8M0}, kNo, kNo, {kBF16}},
    {kDocument, kOnA5, kNz, kRows, Kind::kAntiquant, {kF16}, {kE2M1}, {kF16, kNone}, kNo, kNo,
     {kE8M0}, kNo, kNo, {kF16}},
    {kDocument, kOnA5, kNz, kRows, Kind::kMxW4, {kE4M3}, {kE2M1}, {kF16, kNone}, kNo, kNo, {kE8M0},
     kNo, {kE8M0}, {kF16}},
    {kDocument, kOnA5, kNz, kRows, Kind::kMxW4, {kE4M3}, {kE2M1}, {kBF16, kNone}, kNo, kNo, {kE8M0},
     kNo, {kE8M0}, {kBF16}},
    {kDocument, kOnA5, kNz, kRows, Kind::kKcg, {kI8}, {kI4}, {kF32, kNone}, {kF32}, kNo, {kF16},
     kNo, {kF32}, {kBF16, kF16}},
    // clang-format on
};

at::ScalarType first_dtype(Ins list) { return given(list) ? list[0].scalar_type() : kNone; }

std::string show_first(Ins list) { return given(list) ? show(list[0]) : "nothing"; }

}  // namespace

const Form& form_of(const Grouped& call) {
  std::vector<const Form*> rows = rows_here(kForms, call.nz());
  narrow(rows, "x", call.x[0].dtype, show(call.x[0]), &Form::x);
  narrow(rows, "weight", call.weight[0].dtype, show(call.weight[0]), &Form::weight);
  narrow(rows, "out", call.out[0]->scalar_type(), show(*call.out[0]), &Form::out);
  narrow(rows, "scale", first_dtype(call.scale), show_first(call.scale), &Form::scale);
  narrow(rows, "antiquant_scale", first_dtype(call.antiquant_scale),
         show_first(call.antiquant_scale), &Form::antiquant_scale);
  narrow(rows, "antiquant_offset", first_dtype(call.antiquant_offset),
         show_first(call.antiquant_offset), &Form::antiquant_offset);
  narrow(rows, "offset", first_dtype(call.offset), show_first(call.offset), &Form::offset);
  narrow(rows, "per_token_scale", first_dtype(call.per_token), show_first(call.per_token),
         &Form::per_token);
  narrow(rows, "bias", first_dtype(call.bias), show_first(call.bias), &Form::bias);
  return *rows.front();
}

}  // namespace softnpu::grouped
