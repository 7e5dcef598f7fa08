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

bool has_shared_exponents(In x) {
  return x.scalar_type() == kE4M3 || x.scalar_type() == kE5M2 || x.scalar_type() == kE2M1;
}

struct Routing {
  at::Tensor x, experts, scale, offset;
  int64_t active, capacity, count, drop_pad, tokens_type;
  bool tokens_flag;
  int64_t quant;
  std::vector<int64_t> range;
  int64_t row_type;
  Out x_out, row_index, tokens, scale_out;
  FIELDS(all, x, experts, scale, offset, active, capacity, count, drop_pad, tokens_type,
         tokens_flag, quant, range, row_type, x_out, row_index, tokens, scale_out)

  int64_t first() const { return range.empty() ? 0 : range[0]; }
  int64_t last() const { return range.empty() ? count : range[1]; }
  int64_t pairs() const { return experts.numel(); }  // rows times experts of each

  void check_attributes() const {
    require(experts.size(0) == x.size(0), "expert_idx", show(experts), "a row for each row of x");
    const int64_t most = tokens_type == 2 ? 5120 : 10240;
    require(drop_pad == 0 || drop_pad == 1, "drop_pad_mode", text(drop_pad), "0 or 1");
    require(tokens_type >= 0 && tokens_type <= (drop_pad ? 1 : 2) && tokens_type >= drop_pad,
            "expert_tokens_num_type", text(tokens_type),
            drop_pad ? "1, as drop_pad_mode is 1" : "0, 1 or 2");
    require(count > 0 && count <= most, "expert_num", text(count),
            tokens_type == 2 ? "1 to 5120" : "1 to 10240");
    require(row_type == 0 || row_type == 1, "row_idx_type", text(row_type), "0 or 1");
    require(range.empty() ||
                (range.size() == 2 && range[0] >= 0 && range[0] < range[1] && range[1] <= count),
            "active_expert_range",
            range.size() == 2 ? text(range[0]) + ", " + text(range[1]) : "another length",
            "a first and an end up to expert_num");
    // -1 is torch_npu's default and, by its document, the same as 0: our reading for A2 and A3.
    require(on_a5() ? active == pairs() : active >= -1, "active_num", text(active),
            on_a5() ? "rows of x times experts of each" : "-1 or more");
    require(!on_a5() || tokens_flag, "expert_tokens_num_flag", "false", "true");
    const bool integer_modes = quant == kNot || quant == kStatic || quant == kDynamic;
    const bool a5_modes = quant == kMxE5M2 || quant == kMxE4M3 || quant == kMxE2M1 ||
                          quant == kBlockE5M2 || quant == kBlockE4M3;
    require(integer_modes || (on_a5() && a5_modes), "quant_mode", text(quant),
            on_a5() ? "-1, 0, 1, 2, 3, 9, 11 or 12 (the HIFLOAT8 modes 6, 7 and 8 are not emulated)"
                    : "-1, 0 or 1");
    if (!drop_pad) return;
    require(capacity > 0 && capacity <= x.size(0), "expert_capacity", text(capacity),
            "1 to the rows of x");
    require(first() == 0 && last() == count, "active_expert_range",
            text(first()) + ", " + text(last()), "all experts, as drop_pad_mode is 1");
    require(row_type == 0, "row_idx_type", text(row_type),
            "0, as drop_pad_mode is 1");  // our reading for A2, A3
    require(!on_a5() || (quant == kNot && !has_shared_exponents(x)), "quant_mode", text(quant),
            "-1 and no FLOAT8 or FLOAT4, as drop_pad_mode is 1");
  }

  void check_scales() const {
    // torch_npu 2.13 sizes it by the expert_num of the process's first call without
    // active_expert_range.
    require(tokens_type == 2
                ? tokens->dim() == 2 && tokens->size(0) == count && tokens->size(1) == 2
                : tokens->dim() == 1 && tokens->size(0) == last() - first(),
            "expert_tokens_count_or_cumsum", show(*tokens),
            "a value for each active expert, or [expert_num, 2]");
    require(quant == kNot || (x.scalar_type() != at::kChar && !has_shared_exponents(x)), "x",
            show(x), "fp16, bf16 or fp32, as it is quantised");
    require((quant == kStatic) == offset.defined(), "offset", show(offset),
            quant == kStatic ? "[1], as quant_mode is 0" : "nothing unless quant_mode is 0");
    if (quant == kStatic) {
      require(scale.defined() && scale.dim() == 1 && scale.size(0) == 1, "scale", show(scale),
              "[1]");
      require(offset.size(0) == 1, "offset", show(offset), "[1]");
    } else if (quant == kDynamic && scale.defined()) {
      require(scale.dim() == 2 && scale.size(0) == last() - first() && scale.size(1) == x.size(1),
              "scale", show(scale), "[active experts, H]");
    } else if (quant == kNot && scale.defined()) {
      const int64_t h = x.size(1) * (x.scalar_type() == kE2M1 ? 2 : 1);
      const bool mx = has_shared_exponents(x);
      require(scale.scalar_type() == (mx ? kE8M0 : kF32), "scale", show(scale),
              mx ? "FLOAT8_E8M0" : "fp32");
      require(scale.size(0) == x.size(0) &&
                  (mx ? scale.dim() == 3 && scale.size(1) == ceil_div(h, 64) && scale.size(2) == 2
                      : scale.dim() == 1),
              "scale", show(scale), mx ? "[rows, H / 64, 2]" : "[rows]");
    } else {
      require(!scale.defined(), "scale", show(scale), "nothing in this quant_mode");
    }
  }

  void check() const {
    // The dtypes of x that were added with Ascend 950 are read as its own.
    check_table({{"x", x, true, also_on_a5({kF16, kBF16, kF32, at::kChar}, {kE4M3, kE5M2, kE2M1}),
                  2, 2, kReading},
                 {"expert_idx", experts, true, {at::kInt}, 2, 2, kDocument},
                 {"scale", scale, false, also_on_a5({kF32}, {kE8M0}), 1, 3, kDocument},
                 {"offset", offset, false, {kF32}, 1, 1, kDocument}},
                kTilingRefuses);
    refusing_with(kTilingRefuses, [&] { check_attributes(); });
    check_table(
        {{"expanded_x", *x_out, true,
          also_on_a5({kF16, kBF16, kF32, at::kChar}, {kE4M3, kE5M2, kE2M1}), 2, 3, kDocument},
         {"expanded_row_idx", *row_index, true, {at::kInt}, 1, 1, kDocument},
         {"expert_tokens_count_or_cumsum", *tokens, true, {at::kLong}, 1, 2, kDocument},
         {"expanded_scale", *scale_out, true, also_on_a5({kF32}, {kE8M0}), 1, 3, kDocument}},
        kTilingRefuses);
    refusing_with(kTilingRefuses, [&] { check_scales(); });
  }

  void run() const;
};

// Pairs of row and expert that are copied: in the order of the experts, with the place where each
// one goes.
struct Plan {
  at::Tensor order;   // pairs of active experts, sorted by expert, equal ones in their order
  at::Tensor expert;  // of each of them
  at::Tensor counts;  // of each active expert
};

Plan plan_of(const Routing& routing) {
  const at::Tensor ids = routing.experts.reshape({-1}).to(at::kLong);
  expect_values(ids, 0, routing.count, "expert_idx");
  const at::Tensor sorted = at::argsort(ids, true, 0, false);
  const at::Tensor of_sorted = ids.index_select(0, sorted);
  const at::Tensor mine = of_sorted.ge(routing.first()).logical_and(of_sorted.lt(routing.last()));
  const at::Tensor order = sorted.masked_select(mine), expert = of_sorted.masked_select(mine);
  return {order, expert,
          at::bincount(expert, {}, routing.count).slice(0, routing.first(), routing.last())};
}

void store_counts(const Routing& routing, const Plan& plan) {
  if (!routing.tokens_flag) return;
  if (routing.tokens_type == 1) {
    routing.tokens = plan.counts;
  } else if (routing.tokens_type == 0) {
    routing.tokens = at::cumsum(plan.counts, 0);
  } else {  // pairs of the experts that have rows, then a pair of zeros; what is behind stays: our
            // reading
    const at::Tensor present = plan.counts.nonzero().squeeze(1);
    const at::Tensor pairs =
        at::stack({present.add(routing.first()), plan.counts.index_select(0, present)}, 1);
    routing.tokens.touch();
    routing.tokens->slice(0, 0, pairs.size(0)).copy_(pairs);
    routing.tokens->slice(0, pairs.size(0), pairs.size(0) + 1).zero_();
  }
}

struct Rows {
  at::Tensor y, scale;  // bytes where the type is FLOAT4 or FLOAT8_E8M0
};

Rows int8_rows(const Routing& routing, In x, In expert) {
  if (routing.quant == kStatic)
    return {at::round(x.mul(routing.scale).add(routing.offset)).clamp(-128, 127).to(at::kChar),
            at::Tensor()};
  // The scale divides x times its smooth scale; the document writes x alone: our reading.
  const at::Tensor wide = routing.scale.defined()
                              ? x.mul(routing.scale.index_select(0, expert.sub(routing.first())))
                              : x;
  const at::Tensor scale = at::amax(wide.abs(), {-1}).div(127);
  const at::Tensor by = scale.unsqueeze(-1);
  return {at::round(at::where(by.eq(0), 0.0, wide.div(by))).clamp(-128, 127).to(at::kChar), scale};
}

// FLOAT8 with a fp32 scale for each 128 values, in pairs; a missing one of a pair is zero (our
// reading).
Rows block_rows(In x, at::ScalarType type) {
  const int64_t h = x.size(1), blocks = ceil_div(h, 256) * 2;
  const at::Tensor parts =
      at::constant_pad_nd(x, {0, blocks * 128 - h}).unflatten(1, {blocks, 128});
  const at::Tensor scale = at::amax(parts.abs(), {-1}).div(largest(type)), by = scale.unsqueeze(-1);
  const at::Tensor y = saturated(at::where(by.eq(0), 0.0, parts.div(by)), type);
  return {y.flatten(1).slice(1, 0, h), scale.unflatten(1, {-1, 2})};
}

Rows rows_of(const Routing& routing, In token, In expert) {
  if (routing.quant == kNot) {
    const auto pick = [&token](In v) {  // one-byte types as bytes: ATen has no index_select of them
      return (v.element_size() == 1 ? v.contiguous().view(at::kByte) : v).index_select(0, token);
    };
    return {pick(routing.x), routing.scale.defined() ? pick(routing.scale) : at::Tensor()};
  }
  const at::Tensor x = routing.x.to(kF32).index_select(0, token);
  switch (routing.quant) {
    case kStatic:
    case kDynamic:
      return int8_rows(routing, x, expert);
    case kBlockE5M2:
      return block_rows(x, kE5M2);
    case kBlockE4M3:
      return block_rows(x, kE4M3);
    default: {  // MX with algorithm 0: our reading
      const Mx mx = mx_quantise(x,
                                routing.quant == kMxE5M2   ? kE5M2
                                : routing.quant == kMxE4M3 ? kE4M3
                                                           : kE2M1,
                                {});
      return {mx.y, routing.quant == kMxE2M1 ? mx.scale : mx.scale.flatten(1)};
    }
  }
}

// Copies rows to places of an output whose first dimensions are counted through; other rows are not
// written.
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

void Routing::run() const {
  const Plan plan = plan_of(*this);
  store_counts(*this, plan);
  const int64_t k = experts.size(1), available = plan.order.numel();
  at::Tensor places = at::arange(available), kept = at::arange(available);
  if (drop_pad) {  // the first rows of each expert; places that stay free are zero
    const at::Tensor before = at::cumsum(plan.counts, 0).sub(plan.counts);
    const at::Tensor rank = places.sub(before.index_select(0, plan.expert));
    kept = rank.lt(capacity).nonzero().squeeze(1);
    places = plan.expert.mul(capacity).add(rank).index_select(0, kept);
    x_out->view(at::kByte).zero_();
    if (quant == kDynamic || (quant == kNot && scale.defined())) scale_out->zero_();
  } else if (active > 0 && active < available) {
    kept = places = places.slice(0, 0, active);
  }
  row_index.touch();
  if (row_type == 1) {
    // Behind the active rows stand those of the experts above the range, then those below it.
    const at::Tensor ids = experts.reshape({-1}).to(at::kLong);
    row_index->copy_(at::argsort(ids.masked_fill(ids.lt(first()), count), true, 0, false));
  } else if (drop_pad) {
    row_index->fill_(-1).index_copy_(0, plan.order.index_select(0, kept), places.to(at::kInt));
  } else {  // rows beyond active_num keep their place: our reading
    row_index->fill_(-1).index_copy_(0, plan.order, at::arange(available, at::kInt));
  }
  const at::Tensor token = at::div(plan.order.index_select(0, kept), k, "floor");
  if (token.numel() == 0) return;
  const Rows rows = rows_of(*this, token, plan.expert.index_select(0, kept));
  place(x_out, rows.y, places);
  if (rows.scale.defined()) place(scale_out, rows.scale, places);
}

// mirror-cann/ops-transformer moe/moe_init_routing_quant_v2/docs/aclnnMoeInitRoutingQuantV2.md
struct RoutingInt8 {
  at::Tensor x, experts, scale, offset;
  int64_t active, capacity, count, drop_pad, tokens_mode;
  bool before_flag;
  int64_t quant;
  Out x_out, row_index, tokens, before, scale_out;
  FIELDS(all, x, experts, scale, offset, active, capacity, count, drop_pad, tokens_mode,
         before_flag, quant, x_out, row_index, tokens, before, scale_out)

  bool counted() const { return drop_pad ? before_flag : tokens_mode != 0; }

  void check() const {
    check_table({{"x", x, true, kFloats, 2, 2, kDocument},
                 {"expertIdx", experts, true, {at::kInt}, 2, 2, kDocument},
                 {"scale", scale, quant == kStatic, {kF32}, 1, 2, kDocument},
                 {"offset", offset, quant == kStatic, {kF32}, 1, 1, kDocument},
                 {"expandedXOut", *x_out, true, {kI8}, 2, 3, kDocument},
                 {"expandedRowIdxOut", *row_index, true, {at::kInt}, 1, 1, kDocument},
                 {"expertTokensCountOrCumsumOut",
                  *tokens,
                  counted() && !drop_pad,
                  {at::kInt},
                  1,
                  1,
                  kDocument},
                 {"expertTokensBeforeCapacityOut",
                  *before,
                  counted() && drop_pad,
                  {at::kInt},
                  1,
                  1,
                  kDocument},
                 {"dynamicQuantScaleOut", *scale_out, quant == kDynamic, {kF32}, 1, 1, kDocument}});
    require(experts.size(0) == x.size(0), "expertIdx", show(experts), "a row for each row of x");
    require(quant == kStatic || quant == kDynamic, "quantMode", text(quant), "0 or 1");
    require(drop_pad == 0 || drop_pad == 1, "dropPadMode", text(drop_pad), "0 or 1");
    require(tokens_mode >= 0 && tokens_mode <= 2, "expertTokensCountOrCumsumFlag",
            text(tokens_mode), "0, 1 or 2");
    require(count > 0 || (!drop_pad && !counted()), "expertNum", text(count), "a positive number");
    require(!drop_pad || (capacity > 0 && capacity <= x.size(0)), "expertCapacity", text(capacity),
            "1 to the rows of x");
    const bool one = scale.defined() && scale.dim() == 1 && scale.size(0) == 1;
    require(quant != kStatic || one, "scale", show(scale), "[1]");
    const bool rows = scale.defined() && scale.dim() == 2 && scale.size(1) == x.size(1) &&
                      (scale.size(0) == 1 || scale.size(0) == count);
    require(quant != kDynamic || !scale.defined() || rows, "scale", show(scale),
            "[1, H] or [experts, H]");
  }

  void run() const {
    const int64_t last = count > 0 ? count : experts.max().item<int64_t>() + 1;
    const bool shared = quant == kDynamic && scale.defined() && scale.size(0) == 1;
    const int64_t type = drop_pad || tokens_mode == 2 ? 1 : 0;
    const Routing routing{x,
                          experts,
                          shared ? scale.expand({last, -1}) : scale,
                          offset,
                          active,
                          capacity,
                          last,
                          drop_pad,
                          type,
                          counted(),
                          quant,
                          {},
                          0,
                          x_out,
                          row_index,
                          drop_pad ? before : tokens,
                          scale_out};
    routing.run();
  }
};

}  // namespace

NAMED(aclnnMoeInitRoutingV3, Routing, all, check, run)
NAMED(aclnnMoeInitRoutingQuantV2, RoutingInt8, all, check, run)

}  // namespace softnpu
