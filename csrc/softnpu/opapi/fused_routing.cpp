// npu_moe_init_routing_v2: rows sorted by their expert, copied or quantised. Table and rows:
// mirror-cann/ops-transformer moe/moe_init_routing_v3/docs/aclnnMoeInitRoutingV3.md
#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/div.h>
#include <ATen/ops/round.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>

#include "fused_quant.h"

namespace softnpu {
namespace {

enum QuantMode : int64_t {
  kNot = -1,
  kStatic = 0,
  kDynamic = 1,
  kMxE5M2 = 2,
  kMxE4M3 = 3,
  kMxE2M1 = 9,
  kBlockE5M2 = 11,
  kBlockE4M3 = 12,
};

struct Routing {
  at::Tensor x, experts, scale, offset;
  int64_t active, capacity, count, drop_pad, tokens_type;
  bool tokens_flag;
  int64_t quant;
  std::vector<int64_t> range;
  int64_t row_type;

  int64_t first() const { return range.empty() ? 0 : range[0]; }
  int64_t last() const { return range.empty() ? count : range[1]; }
  int64_t pairs() const { return experts.numel(); }  // rows times experts of each
};

bool has_shared_exponents(In x) {
  return x.scalar_type() == kE4M3 || x.scalar_type() == kE5M2 || x.scalar_type() == kE2M1;
}

void check_attributes(const Routing& r) {
  require(r.experts.size(0) == r.x.size(0), "expert_idx", show(r.experts), "a row for each row of x");
  const int64_t most = r.tokens_type == 2 ? 5120 : 10240;
  require(r.drop_pad == 0 || r.drop_pad == 1, "drop_pad_mode", text(r.drop_pad), "0 or 1");
  require(r.tokens_type >= 0 && r.tokens_type <= (r.drop_pad ? 1 : 2) && r.tokens_type >= r.drop_pad,
          "expert_tokens_num_type", text(r.tokens_type), r.drop_pad ? "1, as drop_pad_mode is 1" : "0, 1 or 2");
  require(r.count > 0 && r.count <= most, "expert_num", text(r.count), r.tokens_type == 2 ? "1 to 5120" : "1 to 10240");
  require(r.row_type == 0 || r.row_type == 1, "row_idx_type", text(r.row_type), "0 or 1");
  require(
      r.range.empty() || (r.range.size() == 2 && r.range[0] >= 0 && r.range[0] < r.range[1] && r.range[1] <= r.count),
      "active_expert_range", r.range.size() == 2 ? text(r.range[0]) + ", " + text(r.range[1]) : "another length",
      "a first and an end up to expert_num");
  // -1 is torch_npu's default and, by its document, the same as 0: our reading for A2 and A3.
  require(on_a5() ? r.active == r.pairs() : r.active >= -1, "active_num", text(r.active),
          on_a5() ? "rows of x times experts of each" : "-1 or more");
  require(!on_a5() || r.tokens_flag, "expert_tokens_num_flag", "false", "true");
  const bool integer_modes = r.quant == kNot || r.quant == kStatic || r.quant == kDynamic;
  const bool a5_modes =
      r.quant == kMxE5M2 || r.quant == kMxE4M3 || r.quant == kMxE2M1 || r.quant == kBlockE5M2 || r.quant == kBlockE4M3;
  require(integer_modes || (on_a5() && a5_modes), "quant_mode", text(r.quant),
          on_a5() ? "-1, 0, 1, 2, 3, 9, 11 or 12 (the HIFLOAT8 modes 6, 7 and 8 are not emulated)" : "-1, 0 or 1");
  if (!r.drop_pad) return;
  require(r.capacity > 0 && r.capacity <= r.x.size(0), "expert_capacity", text(r.capacity), "1 to the rows of x");
  require(r.first() == 0 && r.last() == r.count, "active_expert_range", text(r.first()) + ", " + text(r.last()),
          "all experts, as drop_pad_mode is 1");
  require(r.row_type == 0, "row_idx_type", text(r.row_type), "0, as drop_pad_mode is 1");  // our reading for A2, A3
  require(!on_a5() || (r.quant == kNot && !has_shared_exponents(r.x)), "quant_mode", text(r.quant),
          "-1 and no FLOAT8 or FLOAT4, as drop_pad_mode is 1");
}

void check_scales(const Routing& r, Out tokens) {
  // torch_npu 2.13 sizes it by the expert_num of the process's first call without active_expert_range.
  require(r.tokens_type == 2 ? tokens->dim() == 2 && tokens->size(0) == r.count && tokens->size(1) == 2
                             : tokens->dim() == 1 && tokens->size(0) == r.last() - r.first(),
          "expert_tokens_count_or_cumsum", show(*tokens), "a value for each active expert, or [expert_num, 2]");
  require(r.quant == kNot || (r.x.scalar_type() != at::kChar && !has_shared_exponents(r.x)), "x", show(r.x),
          "fp16, bf16 or fp32, as it is quantised");
  require((r.quant == kStatic) == r.offset.defined(), "offset", show(r.offset),
          r.quant == kStatic ? "[1], as quant_mode is 0" : "nothing unless quant_mode is 0");
  if (r.quant == kStatic) {
    require(r.scale.defined() && r.scale.dim() == 1 && r.scale.size(0) == 1, "scale", show(r.scale), "[1]");
    require(r.offset.size(0) == 1, "offset", show(r.offset), "[1]");
  } else if (r.quant == kDynamic && r.scale.defined()) {
    require(r.scale.dim() == 2 && r.scale.size(0) == r.last() - r.first() && r.scale.size(1) == r.x.size(1), "scale",
            show(r.scale), "[active experts, H]");
  } else if (r.quant == kNot && r.scale.defined()) {
    const int64_t h = r.x.size(1) * (r.x.scalar_type() == kE2M1 ? 2 : 1);
    const bool mx = has_shared_exponents(r.x);
    require(r.scale.scalar_type() == (mx ? kE8M0 : kF32), "scale", show(r.scale), mx ? "FLOAT8_E8M0" : "fp32");
    require(r.scale.size(0) == r.x.size(0) &&
                (mx ? r.scale.dim() == 3 && r.scale.size(1) == ceil_div(h, 64) && r.scale.size(2) == 2
                    : r.scale.dim() == 1),
            "scale", show(r.scale), mx ? "[rows, H / 64, 2]" : "[rows]");
  } else {
    require(!r.scale.defined(), "scale", show(r.scale), "nothing in this quant_mode");
  }
}

void check_routing(const Routing& r, Out x_out, Out row_index, Out tokens, Out scale_out) {
  // The dtypes of x that were added with Ascend 950 are read as its own.
  check_table({{"x", true, also_on_a5({kF16, kBF16, kF32, at::kChar}, {kE4M3, kE5M2, kE2M1}), 2, 2, kReading},
               {"expert_idx", true, {at::kInt}, 2, 2, kDocument},
               {"scale", false, also_on_a5({kF32}, {kE8M0}), 1, 3, kDocument},
               {"offset", false, {kF32}, 1, 1, kDocument}},
              {r.x, r.experts, r.scale, r.offset}, kTilingRefuses);
  refusing_with(kTilingRefuses, [&] { check_attributes(r); });
  check_table({{"expanded_x", true, also_on_a5({kF16, kBF16, kF32, at::kChar}, {kE4M3, kE5M2, kE2M1}), 2, 3, kDocument},
               {"expanded_row_idx", true, {at::kInt}, 1, 1, kDocument},
               {"expert_tokens_count_or_cumsum", true, {at::kLong}, 1, 2, kDocument},
               {"expanded_scale", true, also_on_a5({kF32}, {kE8M0}), 1, 3, kDocument}},
              {*x_out, *row_index, *tokens, *scale_out}, kTilingRefuses);
  refusing_with(kTilingRefuses, [&] { check_scales(r, tokens); });
}

// Pairs of row and expert that are copied: in the order of the experts, with the place where each one goes.
struct Plan {
  at::Tensor order;   // pairs of active experts, sorted by expert, equal ones in their order
  at::Tensor expert;  // of each of them
  at::Tensor counts;  // of each active expert
};

Plan plan(const Routing& r) {
  const at::Tensor ids = r.experts.reshape({-1}).to(at::kLong);
  expect_values(ids, 0, r.count, "expert_idx");
  const at::Tensor sorted = at::argsort(ids, true, 0, false);
  const at::Tensor of_sorted = ids.index_select(0, sorted);
  const at::Tensor mine = of_sorted.ge(r.first()).logical_and(of_sorted.lt(r.last()));
  const at::Tensor order = sorted.masked_select(mine), expert = of_sorted.masked_select(mine);
  return {order, expert, at::bincount(expert, {}, r.count).slice(0, r.first(), r.last())};
}

void store_counts(const Routing& r, const Plan& p, Out o) {
  if (!r.tokens_flag) return;
  if (r.tokens_type == 1) {
    o = p.counts;
  } else if (r.tokens_type == 0) {
    o = at::cumsum(p.counts, 0);
  } else {  // pairs of the experts that have rows, then a pair of zeros; what is behind stays: our reading
    const at::Tensor present = p.counts.nonzero().squeeze(1);
    const at::Tensor pairs = at::stack({present.add(r.first()), p.counts.index_select(0, present)}, 1);
    o.touch();
    o->slice(0, 0, pairs.size(0)).copy_(pairs);
    o->slice(0, pairs.size(0), pairs.size(0) + 1).zero_();
  }
}

struct Rows {
  at::Tensor y, scale;  // bytes where the type is FLOAT4 or FLOAT8_E8M0
};

Rows int8_rows(const Routing& r, In x, In expert) {
  if (r.quant == kStatic) return {at::round(x.mul(r.scale).add(r.offset)).clamp(-128, 127).to(at::kChar), at::Tensor()};
  // The scale divides x times its smooth scale; the document writes x alone: our reading.
  const at::Tensor wide = r.scale.defined() ? x.mul(r.scale.index_select(0, expert.sub(r.first()))) : x;
  const at::Tensor scale = at::amax(wide.abs(), {-1}).div(127);
  const at::Tensor by = scale.unsqueeze(-1);
  return {at::round(at::where(by.eq(0), 0.0, wide.div(by))).clamp(-128, 127).to(at::kChar), scale};
}

// FLOAT8 with a fp32 scale for each 128 values, in pairs; a missing one of a pair is zero (our reading).
Rows block_rows(In x, at::ScalarType type) {
  const int64_t h = x.size(1), blocks = ceil_div(h, 256) * 2;
  const at::Tensor parts = at::constant_pad_nd(x, {0, blocks * 128 - h}).unflatten(1, {blocks, 128});
  const at::Tensor scale = at::amax(parts.abs(), {-1}).div(largest(type)), by = scale.unsqueeze(-1);
  const at::Tensor y = saturated(at::where(by.eq(0), 0.0, parts.div(by)), type);
  return {y.flatten(1).slice(1, 0, h), scale.unflatten(1, {-1, 2})};
}

Rows rows_of(const Routing& r, In token, In expert) {
  if (r.quant == kNot) {
    const auto pick = [&token](In v) {  // one-byte types as bytes: ATen has no index_select of them
      return (v.element_size() == 1 ? v.contiguous().view(at::kByte) : v).index_select(0, token);
    };
    return {pick(r.x), r.scale.defined() ? pick(r.scale) : at::Tensor()};
  }
  const at::Tensor x = r.x.to(kF32).index_select(0, token);
  switch (r.quant) {
    case kStatic:
    case kDynamic:
      return int8_rows(r, x, expert);
    case kBlockE5M2:
      return block_rows(x, kE5M2);
    case kBlockE4M3:
      return block_rows(x, kE4M3);
    default: {  // MX with algorithm 0: our reading
      const Mx mx = mx_quantise(x, r.quant == kMxE5M2 ? kE5M2 : r.quant == kMxE4M3 ? kE4M3 : kE2M1, {});
      return {mx.y, r.quant == kMxE2M1 ? mx.scale : mx.scale.flatten(1)};
    }
  }
}

// Copies rows to places of an output whose first dimensions are counted through; other rows are not written.
void place(Out o, In rows, In places) {
  o.touch();
  const bool bytes = o->element_size() == 1;
  const at::Tensor whole = bytes ? o->view(at::kByte) : *o;
  const at::Tensor source = bytes ? rows.contiguous().view(at::kByte) : rows.to(o->scalar_type());
  if (source.numel() == 0) return;
  std::vector<int64_t> shape = source.sizes().vec();
  shape[0] = -1;
  whole.view(shape).index_copy_(0, places, source);
}

void route(const Routing& r, Out x_out, Out row_index, Out tokens, Out scale_out) {
  const Plan p = plan(r);
  store_counts(r, p, tokens);
  const int64_t k = r.experts.size(1), available = p.order.numel();
  at::Tensor places = at::arange(available), kept = at::arange(available);
  if (r.drop_pad) {  // the first rows of each expert; places that stay free are zero
    const at::Tensor before = at::cumsum(p.counts, 0).sub(p.counts);
    const at::Tensor rank = places.sub(before.index_select(0, p.expert));
    kept = rank.lt(r.capacity).nonzero().squeeze(1);
    places = p.expert.mul(r.capacity).add(rank).index_select(0, kept);
    x_out->view(at::kByte).zero_();
    if (r.quant == kDynamic || (r.quant == kNot && r.scale.defined())) scale_out->zero_();
  } else if (r.active > 0 && r.active < available) {
    kept = places = places.slice(0, 0, r.active);
  }
  row_index.touch();
  if (r.row_type == 1) {
    row_index->slice(0, 0, available).copy_(p.order);  // what is behind is not written
  } else if (r.drop_pad) {
    row_index->fill_(-1).index_copy_(0, p.order.index_select(0, kept), places.to(at::kInt));
  } else {  // rows beyond active_num keep their place: our reading
    row_index->fill_(-1).index_copy_(0, p.order, at::arange(available, at::kInt));
  }
  const at::Tensor token = at::div(p.order.index_select(0, kept), k, "floor");
  if (token.numel() == 0) return;
  const Rows rows = rows_of(r, token, p.expert.index_select(0, kept));
  place(x_out, rows.y, places);
  if (rows.scale.defined()) place(scale_out, rows.scale, places);
}

constexpr auto check_v3 = [](In x, In experts, In scale, In offset, int64_t active, int64_t capacity, int64_t count,
                             int64_t drop_pad, int64_t tokens_type, bool tokens_flag, int64_t quant, Ints range,
                             int64_t row_type, Out x_out, Out row_index, Out tokens, Out scale_out) {
  check_routing(
      {x, experts, scale, offset, active, capacity, count, drop_pad, tokens_type, tokens_flag, quant, range, row_type},
      x_out, row_index, tokens, scale_out);
};

}  // namespace

CHECKED(aclnnMoeInitRoutingV3, check_v3,
        [](In x, In experts, In scale, In offset, int64_t active, int64_t capacity, int64_t count, int64_t drop_pad,
           int64_t tokens_type, bool tokens_flag, int64_t quant, Ints range, int64_t row_type, Out x_out, Out row_index,
           Out tokens, Out scale_out) {
          route({x, experts, scale, offset, active, capacity, count, drop_pad, tokens_type, tokens_flag, quant, range,
                 row_type},
                x_out, row_index, tokens, scale_out);
        })

}  // namespace softnpu
