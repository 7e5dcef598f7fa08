// npu_grouped_matmul_finalize_routing: a grouped product whose rows are added up at their tokens.
// mirror-cann ops-transformer:
// gmm/grouped_matmul_finalize_routing/docs/aclnnGroupedMatmulFinalizeRoutingV3.md (rows and
// columns), aclnnGroupedMatmulFinalizeRoutingWeightNzV2.md (NZ); torch_npu's documentation string
// for the sizes and for logit, which the formula leaves out.
#include <ATen/ops/zeros.h>

#include "fused_grouped.h"

namespace softnpu::grouped {
namespace {

struct Routing {
  Matrix x, weight;
  at::Tensor scale, bias, offset, antiquant_scale, antiquant_offset, token_scale, list, shared,
      logit, index;
  int64_t dtype;
  float shared_weight;
  int64_t shared_offset;
  bool x_transposed, weight_transposed;
  int64_t list_type;
  std::vector<int64_t> tuning;
  Out out;
  FIELDS(all, x, weight, scale, bias, offset, antiquant_scale, antiquant_offset, token_scale, list,
         shared, logit, index, dtype, shared_weight, shared_offset, x_transposed, weight_transposed,
         list_type, tuning, out)

  int64_t rows() const { return x.size(0); }
  int64_t depth() const { return x.size(1); }
  int64_t columns() const { return weight.size(2); }
  int64_t groups() const { return weight.size(0); }
  bool mx() const { return scale.defined() && scale.scalar_type() == kE8M0; }
  Routing opened() const {
    Routing result = *this;
    result.weight = weight.as_int4();
    return result;
  }
  void check() const;
  void run() const;
};

// Columns: chips, layouts, x, weight, scale, bias, offset, token_scale, row_index.
struct RoutingForm {
  unsigned where, layouts;
  Types x, weight, scale, bias, offset, token_scale, index;
};
const std::vector<RoutingForm>& routing_forms() {
  const Types no = {kNone}, k64 = {at::kLong}, packed = {at::kLong, at::kUInt64};
  // clang-format off
  static const std::vector<RoutingForm> table = {
      {kOnA2 | kOnA3, kNd | kNz, {kI8}, {kI4}, packed, {kF32}, {kF32, kNone}, {kF32}, {at::kLong}},
      // int32 indices, and no pertoken_scale: the text allows them, the table does not
      {kOnA2 | kOnA3, kNz, {kI8}, {kI8}, {kF32, kBF16}, no, no, {kF32, kNone}, {at::kLong, kI32}},
      {kOnA5, kNd, {kE4M3, kE5M2}, {kE4M3, kE5M2}, {kE8M0}, {kBF16, kNone}, no, {kE8M0}, k64},
      {kOnA5, kNd, {kE2M1}, {kE2M1}, {kE8M0}, {kBF16, kNone}, no, {kE8M0}, k64},
      {kOnA5, kNz, {kI8}, {kI8}, {kF32, kBF16}, {kBF16, kNone}, no, {kF32, kNone},
       {at::kLong, kI32}},
      {kOnA5, kNz, {kE4M3}, {kE4M3}, {kF32, kBF16}, {kBF16, kNone}, no, {kF32, kNone}, k64},
      {kOnA5, kNz, {kE4M3}, {kE2M1}, {kE8M0}, {kBF16, kNone}, no, {kE8M0}, k64},
  };
  // clang-format on
  return table;
}

at::ScalarType dtype_of(In x) { return x.defined() ? x.scalar_type() : kNone; }

void check_combination(const Routing& call) {
  auto rows = rows_here(routing_forms(), call.weight.nz);
  narrow(rows, "x1", call.x.dtype, show(call.x), &RoutingForm::x);
  narrow(rows, "x2", call.weight.dtype, show(call.weight), &RoutingForm::weight);
  narrow(rows, "scale", dtype_of(call.scale), show(call.scale), &RoutingForm::scale);
  narrow(rows, "bias", dtype_of(call.bias), show(call.bias), &RoutingForm::bias);
  narrow(rows, "offset", dtype_of(call.offset), show(call.offset), &RoutingForm::offset);
  narrow(rows, "pertoken_scale", dtype_of(call.token_scale), show(call.token_scale),
         &RoutingForm::token_scale);
  narrow(rows, "row_index", dtype_of(call.index), show(call.index), &RoutingForm::index);
}

void check_a23(const Routing& call) {
  const int64_t k = call.depth(), n = call.columns(), e = call.groups();
  require(call.rows() >= 1 && call.rows() <= 16 * 1024 * 8, "x1", show(call.x), "1 to 131072 rows");
  require(e >= 1 && e <= 256, "x2", show(call.weight), "1 to 256 groups");
  require(!call.weight.transposed, "x2", "a transposed tensor", "not transposed");
  if (call.weight.dtype == kI4) {
    require(k == 2048 && n == 7168, "x2", show(call.weight), "K 2048 and N 7168");
    require_shape("scale", call.scale, {{e, 1, n}});
    if (call.offset.defined()) require_shape("offset", call.offset, {{e, 1, n}});
    require_shape("bias", call.bias, {{e, n}});
  } else {
    require(k % 16 == 0, "x1", show(call.x), "K a multiple of 16");
    require(n % 32 == 0 && n >= 256, "x2", show(call.weight), "N a multiple of 32, at least 256");
    require_shape("scale", call.scale,
                  {{e, n}, {e, 1, n}});  // torch_npu's text has the first, CANN's the second
  }
  if (call.token_scale.defined())
    require_shape("pertoken_scale", call.token_scale, {{call.rows()}});
}

void check_a5(const Routing& call) {
  const int64_t k = call.depth(), n = call.columns(), e = call.groups(), m = call.rows();
  require(e >= 1 && e <= 1024, "x2", show(call.weight), "1 to 1024 groups");
  require(call.logit.defined(), "logit", "nothing", "[M] on this chip");
  require(call.tuning.empty() || !call.weight.nz, "tuning_config", "a value",
          "nothing on this chip");
  require(call.out->size(0) <= m && call.shared_offset <= m, "shared_input_offset",
          text(call.shared_offset), "0 to M");
  if (!call.mx()) {
    require_shape("scale", call.scale, {{e, 1, n}});
    if (call.token_scale.defined()) require_shape("pertoken_scale", call.token_scale, {{m}});
    return;
  }
  // A view in the order of x2; the document's [e, n, K/64, 2] is that of the memory (our reading).
  require_shape("scale", call.scale, {{e, ceil_div(k, 64), n, 2}});
  require_shape("pertoken_scale", call.token_scale, {{m, ceil_div(k, 64), 2}});
  if (call.x.dtype == kE2M1) {
    require(k % 2 == 0 && k != 2, "x1", show(call.x), "an even K that is not 2");
    require(call.weight.transposed || n % 2 == 0, "x2", show(call.weight), "an even N");
  }
  if (call.weight.nz) {
    require(call.weight.transposed, "x2", "a tensor that is not transposed", "a transposed one");
    require(k % 32 == 0 && n % 32 == 0, "x2", show(call.weight), "K and N multiples of 32");
  }
}

void check_routing(const Routing& call) {
  require(call.x.dim() == 2 && !call.x.transposed && !call.x_transposed, "x1", show(call.x),
          "[M, K], not transposed");
  require(call.weight.dim() == 3 && call.weight.size(1) == call.depth(), "x2", show(call.weight),
          "[groups, K, N]");
  require(!call.antiquant_scale.defined() && !call.antiquant_offset.defined(), "antiquant_scale",
          "a tensor", "nothing");
  check_combination(call);
  check_table({{"group_list", call.list, true, {at::kLong}, 1, 1, Source::kDocument},
               {"shared_input", call.shared, false, {kBF16}, 2, 2, Source::kDocument},
               {"logit", call.logit, false, {kF32}, 1, 1, Source::kDocument},
               {"out", *call.out, true, {kF32}, 2, 2, Source::kDocument}});
  require(call.dtype == 0, "dtype", text(call.dtype), "0 (fp32)");
  require(call.list_type == 0 || call.list_type == 1, "group_list_type", text(call.list_type),
          "0 or 1");
  require_shape("group_list", call.list, {{call.groups()}});
  require_shape("row_index", call.index, {{call.rows()}});
  if (call.logit.defined()) require_shape("logit", call.logit, {{call.rows()}});
  if (call.bias.defined()) require_shape("bias", call.bias, {{call.groups(), call.columns()}});
  require(call.shared_offset >= 0, "shared_input_offset", text(call.shared_offset), "0 or more");
  if (call.shared.defined()) {
    require(call.shared.size(1) == call.columns(), "shared_input", show(call.shared), "N columns");
    // A5's document; on A2 and A3 our reading (its "at most batch / e" is broken by torch_npu's own
    // example)
    require(call.shared_offset + call.shared.size(0) <= call.out->size(0), "shared_input",
            show(call.shared), "rows that end inside the output");
  }
  on_a5() ? check_a5(call) : check_a23(call);
}

at::Tensor group_rows(const Routing& call, In x, const Group& group) {
  const at::Tensor weight = call.weight[group.expert].read();
  if (call.mx()) {
    const int64_t k = call.depth();
    const at::Tensor rows = mx_rows(call.token_scale.slice(0, group.start, group.end));
    return product(x.to(kF32).mul(stretch(rows, 32, 1, k)),
                   weight.to(kF32).mul(stretch(mx_columns(call.scale[group.expert]), 32, 0, k)));
  }
  const at::Tensor scale = low_float(call.scale[group.expert]);
  at::Tensor y;
  if (call.weight.dtype ==
      kI4) {  // bias is 8 * weight * scale summed along K; offset has the place of grouped_matmul's
    y = product(x.to(at::kShort).sub(8), weight).to(kF32).mul(scale).add(call.bias[group.expert]);
    if (call.offset.defined()) y = y.add(x.to(kF32).sum(-1, true).mul(call.offset[group.expert]));
  } else {
    y = product(x, weight).to(kF32).mul(scale);
  }
  return call.token_scale.defined()
             ? y.mul(call.token_scale.slice(0, group.start, group.end).unsqueeze(-1))
             : y;
}

void run_routing(const Routing& call) {
  const at::Tensor x = call.x.read();
  at::Tensor sum =
      at::zeros(call.out->sizes(), kF32);  // tokens that no row belongs to are zero (our reading)
  for (const Group& group : read_groups(call.list, call.list_type, call.rows())) {
    if (group.start == group.end) continue;
    at::Tensor y = group_rows(call, x.slice(0, group.start, group.end), group);
    if (call.bias.defined() && call.weight.dtype != kI4)
      y = y.add(call.bias[group.expert].to(kF32));
    if (call.logit.defined()) y = y.mul(call.logit.slice(0, group.start, group.end).unsqueeze(-1));
    sum.index_add_(0, call.index.slice(0, group.start, group.end).to(at::kLong), y);
  }
  if (call.shared.defined()) {
    const int64_t end = call.shared_offset + call.shared.size(0);
    sum.slice(0, call.shared_offset, end).add_(call.shared.to(kF32).mul(call.shared_weight));
  }
  call.out = sum;
}

void Routing::check() const {
  require(!weight_transposed, "transpose_x2", "true",
          "false (a transposed view of x2 says it; the flag is not emulated)");
  check_routing(opened());
}

void Routing::run() const { run_routing(opened()); }

}  // namespace

NAMED(aclnnGroupedMatmulFinalizeRoutingV3, Routing, all, check, run)
NAMED(aclnnGroupedMatmulFinalizeRoutingWeightNzV2, Routing, all, check, run)

}  // namespace softnpu::grouped
