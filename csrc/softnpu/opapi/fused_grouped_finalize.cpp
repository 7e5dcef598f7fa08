// npu_grouped_matmul_finalize_routing: a grouped product whose rows are added up at their tokens.
// mirror-cann ops-transformer: gmm/grouped_matmul_finalize_routing/docs/aclnnGroupedMatmulFinalizeRoutingV3.md (rows
// and columns), aclnnGroupedMatmulFinalizeRoutingWeightNzV2.md (NZ); torch_npu's documentation string for the sizes and
// for logit, which the formula leaves out.
#include <ATen/ops/zeros.h>

#include "fused_grouped.h"

namespace softnpu::grouped {
namespace {

struct Routing {
  Matrix x, weight;
  In scale, bias, offset, antiquant_scale, antiquant_offset, token_scale, list, shared, logit, index;
  int64_t dtype;
  float shared_weight;
  int64_t shared_offset;
  bool x_transposed;
  int64_t list_type;
  Ints tuning;
  Out out;

  int64_t rows() const { return x.size(0); }
  int64_t depth() const { return x.size(1); }
  int64_t columns() const { return weight.size(2); }
  int64_t groups() const { return weight.size(0); }
  bool mx() const { return scale.defined() && scale.scalar_type() == kE8M0; }
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
      // int32 indices: the text allows them, the table does not
      {kOnA2 | kOnA3, kNz, {kI8}, {kI8}, {kF32, kBF16}, no, no, {kF32}, {at::kLong, kI32}},
      {kOnA5, kNd, {kE4M3, kE5M2}, {kE4M3, kE5M2}, {kE8M0}, {kBF16, kNone}, no, {kE8M0}, k64},
      {kOnA5, kNd, {kE2M1}, {kE2M1}, {kE8M0}, {kBF16, kNone}, no, {kE8M0}, k64},
      {kOnA5, kNz, {kI8}, {kI8}, {kF32, kBF16}, {kBF16, kNone}, no, {kF32, kNone}, {at::kLong, kI32}},
      {kOnA5, kNz, {kE4M3}, {kE4M3}, {kF32, kBF16}, {kBF16, kNone}, no, {kF32, kNone}, k64},
      {kOnA5, kNz, {kE4M3}, {kE2M1}, {kE8M0}, {kBF16, kNone}, no, {kE8M0}, k64},
  };
  // clang-format on
  return table;
}

at::ScalarType dtype_of(In x) { return x.defined() ? x.scalar_type() : kNone; }

void check_combination(const Routing& c) {
  auto rows = rows_here(routing_forms(), c.weight.nz);
  narrow(rows, "x1", c.x.dtype, show(c.x), &RoutingForm::x);
  narrow(rows, "x2", c.weight.dtype, show(c.weight), &RoutingForm::weight);
  narrow(rows, "scale", dtype_of(c.scale), show(c.scale), &RoutingForm::scale);
  narrow(rows, "bias", dtype_of(c.bias), show(c.bias), &RoutingForm::bias);
  narrow(rows, "offset", dtype_of(c.offset), show(c.offset), &RoutingForm::offset);
  narrow(rows, "pertoken_scale", dtype_of(c.token_scale), show(c.token_scale), &RoutingForm::token_scale);
  narrow(rows, "row_index", dtype_of(c.index), show(c.index), &RoutingForm::index);
}

void check_a23(const Routing& c) {
  const int64_t k = c.depth(), n = c.columns(), e = c.groups();
  require(c.rows() >= 1 && c.rows() <= 16 * 1024 * 8, "x1", show(c.x), "1 to 131072 rows");
  require(e >= 1 && e <= 256, "x2", show(c.weight), "1 to 256 groups");
  require(!c.weight.transposed, "x2", "a transposed tensor", "not transposed");
  if (c.weight.dtype == kI4) {
    require(k == 2048 && n == 7168, "x2", show(c.weight), "K 2048 and N 7168");
    require_shape("scale", c.scale, {{e, 1, n}});
    if (c.offset.defined()) require_shape("offset", c.offset, {{e, 1, n}});
    require_shape("bias", c.bias, {{e, n}});
  } else {
    require(k % 16 == 0, "x1", show(c.x), "K a multiple of 16");
    require(n % 32 == 0 && n >= 256, "x2", show(c.weight), "N a multiple of 32, at least 256");
    require_shape("scale", c.scale, {{e, n}, {e, 1, n}});  // torch_npu's text has the first, CANN's the second
  }
  require_shape("pertoken_scale", c.token_scale, {{c.rows()}});
}

void check_a5(const Routing& c) {
  const int64_t k = c.depth(), n = c.columns(), e = c.groups(), m = c.rows();
  require(e >= 1 && e <= 1024, "x2", show(c.weight), "1 to 1024 groups");
  require(c.logit.defined(), "logit", "nothing", "[M] on this chip");
  require(c.tuning.empty() || !c.weight.nz, "tuning_config", "a value", "nothing on this chip");
  require(c.out->size(0) <= m && c.shared_offset <= m, "shared_input_offset", text(c.shared_offset), "0 to M");
  if (!c.mx()) {
    require_shape("scale", c.scale, {{e, 1, n}});
    if (c.token_scale.defined()) require_shape("pertoken_scale", c.token_scale, {{m}});
    return;
  }
  // A view in the order of x2; the document's [e, n, K/64, 2] is that of the memory (our reading).
  require_shape("scale", c.scale, {{e, ceil_div(k, 64), n, 2}});
  require_shape("pertoken_scale", c.token_scale, {{m, ceil_div(k, 64), 2}});
  if (c.x.dtype == kE2M1) {
    require(k % 2 == 0 && k != 2, "x1", show(c.x), "an even K that is not 2");
    require(c.weight.transposed || n % 2 == 0, "x2", show(c.weight), "an even N");
  }
  if (c.weight.nz) {
    require(c.weight.transposed, "x2", "a tensor that is not transposed", "a transposed one");
    require(k % 32 == 0 && n % 32 == 0, "x2", show(c.weight), "K and N multiples of 32");
  }
}

void check_routing(const Routing& c) {
  require(c.x.dim() == 2 && !c.x.transposed && !c.x_transposed, "x1", show(c.x), "[M, K], not transposed");
  require(c.weight.dim() == 3 && c.weight.size(1) == c.depth(), "x2", show(c.weight), "[groups, K, N]");
  require(!c.antiquant_scale.defined() && !c.antiquant_offset.defined(), "antiquant_scale", "a tensor", "nothing");
  check_combination(c);
  check_table({{"group_list", true, {at::kLong}, 1, 1, Source::kDocument},
               {"shared_input", false, {kBF16}, 2, 2, Source::kDocument},
               {"logit", false, {kF32}, 1, 1, Source::kDocument},
               {"out", true, {kF32}, 2, 2, Source::kDocument}},
              {c.list, c.shared, c.logit, *c.out});
  require(c.dtype == 0, "dtype", text(c.dtype), "0 (fp32)");
  require(c.list_type == 0 || c.list_type == 1, "group_list_type", text(c.list_type), "0 or 1");
  require_shape("group_list", c.list, {{c.groups()}});
  require_shape("row_index", c.index, {{c.rows()}});
  if (c.logit.defined()) require_shape("logit", c.logit, {{c.rows()}});
  if (c.bias.defined()) require_shape("bias", c.bias, {{c.groups(), c.columns()}});
  require(c.shared_offset >= 0, "shared_input_offset", text(c.shared_offset), "0 or more");
  if (c.shared.defined()) {
    require(c.shared.size(1) == c.columns(), "shared_input", show(c.shared), "N columns");
    // A5's document; on A2 and A3 our reading (its "at most batch / e" is broken by torch_npu's own example)
    require(c.shared_offset + c.shared.size(0) <= c.out->size(0), "shared_input", show(c.shared),
            "rows that end inside the output");
  }
  on_a5() ? check_a5(c) : check_a23(c);
}

at::Tensor group_rows(const Routing& c, In x, const Group& group) {
  const at::Tensor weight = c.weight[group.expert].read();
  if (c.mx()) {
    const int64_t k = c.depth();
    const at::Tensor rows = mx_rows(c.token_scale.slice(0, group.start, group.end));
    return product(x.to(kF32).mul(stretch(rows, 32, 1, k)),
                   weight.to(kF32).mul(stretch(mx_columns(c.scale[group.expert]), 32, 0, k)));
  }
  const at::Tensor scale = low_float(c.scale[group.expert]);
  at::Tensor y;
  if (c.weight.dtype == kI4) {  // bias is 8 * weight * scale summed along K; offset has the place of grouped_matmul's
    y = product(x.to(at::kShort).sub(8), weight).to(kF32).mul(scale).add(c.bias[group.expert]);
    if (c.offset.defined()) y = y.add(x.to(kF32).sum(-1, true).mul(c.offset[group.expert]));
  } else {
    y = product(x, weight).to(kF32).mul(scale);
  }
  return c.token_scale.defined() ? y.mul(c.token_scale.slice(0, group.start, group.end).unsqueeze(-1)) : y;
}

void run_routing(const Routing& c) {
  const at::Tensor x = c.x.read();
  at::Tensor sum = at::zeros(c.out->sizes(), kF32);  // tokens that no row belongs to are zero (our reading)
  for (const Group& group : read_groups(c.list, c.list_type, c.rows())) {
    if (group.start == group.end) continue;
    at::Tensor y = group_rows(c, x.slice(0, group.start, group.end), group);
    if (c.bias.defined() && c.weight.dtype != kI4) y = y.add(c.bias[group.expert].to(kF32));
    if (c.logit.defined()) y = y.mul(c.logit.slice(0, group.start, group.end).unsqueeze(-1));
    sum.index_add_(0, c.index.slice(0, group.start, group.end).to(at::kLong), y);
  }
  if (c.shared.defined()) {
    const int64_t end = c.shared_offset + c.shared.size(0);
    sum.slice(0, c.shared_offset, end).add_(c.shared.to(kF32).mul(c.shared_weight));
  }
  c.out = sum;
}

Routing routing(Matrix_ x, Matrix_ w, In scale, In bias, In offset, In aq_scale, In aq_offset, In token_scale, In list,
                In shared, In logit, In index, int64_t dtype, float shared_weight, int64_t shared_offset, bool x_t,
                int64_t list_type, Ints tuning, Out out) {
  return {x,     w.as_int4(), scale, bias,          offset,        aq_scale, aq_offset, token_scale, list, shared,
          logit, index,       dtype, shared_weight, shared_offset, x_t,      list_type, tuning,      out};
}

constexpr auto check_v3 = [](Matrix_ x, Matrix_ w, In scale, In bias, In offset, In aq_scale, In aq_offset,
                             In token_scale, In list, In shared, In logit, In index, int64_t dtype, float shared_weight,
                             int64_t shared_offset, bool x_t, bool w_t, int64_t list_type, Ints tuning, Out out) {
  require(!w_t, "transpose_x2", "true", "false (a transposed view of x2 says it; the flag is not emulated)");
  check_routing(routing(x, w, scale, bias, offset, aq_scale, aq_offset, token_scale, list, shared, logit, index, dtype,
                        shared_weight, shared_offset, x_t, list_type, tuning, out));
};
constexpr auto run_v3 = [](Matrix_ x, Matrix_ w, In scale, In bias, In offset, In aq_scale, In aq_offset,
                           In token_scale, In list, In shared, In logit, In index, int64_t dtype, float shared_weight,
                           int64_t shared_offset, bool x_t, bool, int64_t list_type, Ints tuning, Out out) {
  run_routing(routing(x, w, scale, bias, offset, aq_scale, aq_offset, token_scale, list, shared, logit, index, dtype,
                      shared_weight, shared_offset, x_t, list_type, tuning, out));
};

}  // namespace

CHECKED(aclnnGroupedMatmulFinalizeRoutingV3, check_v3, run_v3)
CHECKED(aclnnGroupedMatmulFinalizeRoutingWeightNzV2, check_v3, run_v3)

}  // namespace softnpu::grouped
