// Gradients of the tokens' permutation, and permutation by a map of tokens and experts. Tables:
// argument, its tensor, required, dtypes, ranks, source.
#include <ATen/TensorIndexing.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/masked_scatter.h>
#include <ATen/ops/masked_select.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include "check.h"

namespace softnpu {
namespace {

at::Tensor rows_at(In x, In index) { return x.index_select(0, index.to(at::kLong)).to(kF32); }

// Only rows [0, count) of an index exist; the others read zeros.
at::Tensor rows_or_zero(In x, In index) {
  const at::Tensor missing = index.ge(x.size(0)).logical_or(index.lt(0));
  return rows_at(x, index.masked_fill(missing, 0)).masked_fill(missing.unsqueeze(-1), 0);
}

// mirror-cann/ops-transformer moe/moe_token_permute_grad/docs/aclnnMoeTokenPermuteGrad.md. Rows
// that num_out_tokens dropped give nothing.
struct PermuteGradient {
  at::Tensor gradient, sorted_indices;
  int64_t topk;
  bool padded_mode;
  Out out;
  FIELDS(all, gradient, sorted_indices, topk, padded_mode, out)

  void check() const {
    check_table({{"permutedOutputGrad", gradient, true, kFloats, 2, 2, kDocument},
                 {"sortedIndices", sorted_indices, true, {kI32}, 1, 1, kDocument},
                 {"out", *out, true, kFloats, 2, 2, kDocument}});
    require(!padded_mode, "paddedMode", "true", "false");
    require(topk >= 1 && (on_a5() || topk <= 512), "numTopk", text(topk), "1 to 512");
    require(sorted_indices.numel() == out->size(0) * topk, "sortedIndices", show(sorted_indices),
            "numTopk values for each row of out");
    require(gradient.size(1) == out->size(1), "out", show(*out), "the width of the gradient");
  }

  void run() const {
    expect_values(sorted_indices, 0, sorted_indices.numel(), "sortedIndices");
    out = rows_or_zero(gradient, sorted_indices).view({out->size(0), topk, -1}).sum(1);
  }
};

// mirror-cann/ops-transformer moe/moe_token_unpermute_grad/docs/aclnnMoeTokenUnpermuteGrad.md
struct UnpermuteGradient {
  at::Tensor permuted, gradient, sorted_indices, probs;
  bool padded_mode;
  std::vector<int64_t> restore_shape;
  Out permuted_gradient, probs_gradient;
  FIELDS(all, permuted, gradient, sorted_indices, probs, padded_mode, restore_shape,
         permuted_gradient, probs_gradient)

  void check() const {
    check_table({{"permutedTokens", permuted, probs.defined(), kFloats, 2, 2, kDocument},
                 {"unpermutedTokensGrad", gradient, true, kFloats, 2, 2, kDocument},
                 {"sortedIndices", sorted_indices, true, {kI32}, 1, 1, kDocument},
                 {"probs", probs, false, kFloats, 2, 2, kDocument},
                 {"permutedTokensGradOut", *permuted_gradient, true, kFloats, 2, 2, kDocument},
                 {"probsGradOut", *probs_gradient, probs.defined(), kFloats, 1, 2, kDocument}});
    require(!padded_mode, "paddedMode", "true", "false");
    require(!probs.defined() ||
                (probs.numel() == sorted_indices.numel() && probs.size(0) == gradient.size(0)),
            "probs", show(probs), "a row for each token, a value for each sorted index");
    require(permuted_gradient->size(0) == sorted_indices.numel(), "permutedTokensGradOut",
            show(*permuted_gradient), "a row for each sorted index");
  }

  void run() const {
    expect_values(sorted_indices, 0, sorted_indices.numel(), "sortedIndices");
    const at::Tensor to = sorted_indices.to(at::kLong), wide = gradient.to(kF32);
    const int64_t width = gradient.size(1);
    at::Tensor rows = wide;
    if (probs.defined())
      rows = wide.unsqueeze(1).mul(probs.to(kF32).unsqueeze(-1)).reshape({-1, width});
    permuted_gradient = at::zeros({to.numel(), width}, kF32).index_copy_(0, to, rows);
    if (probs.defined())
      probs_gradient = rows_at(permuted, to)
                           .view({probs.size(0), probs.size(1), width})
                           .mul(wide.unsqueeze(1))
                           .sum(-1);
  }
};

// mirror-cann/ops-transformer moe/moe_token_permute_with_routing_map/docs/
// aclnnMoeTokenPermuteWithRoutingMap.md
struct MapPermute {
  at::Tensor tokens, map, probs;
  int64_t rows;
  bool padded;
  Out permuted, permuted_probs, sorted_indices;
  FIELDS(all, tokens, map, probs, rows, padded, permuted, permuted_probs, sorted_indices)

  void check() const {
    check_table({{"tokens", tokens, true, kFloats, 2, 2, kDocument},
                 {"routingMap", map, true, {at::kBool, at::kChar}, 2, 2, kDocument},
                 {"probs", probs, false, kFloats, 2, 2, kDocument},
                 {"permuteTokensOut", *permuted, true, kFloats, 2, 2, kDocument},
                 {"permuteProbsOut", *permuted_probs, probs.defined(), kFloats, 1, 1, kDocument},
                 {"sortedIndicesOut", *sorted_indices, true, {kI32}, 1, 1, kDocument}});
    require(map.size(0) == tokens.size(0), "routingMap", show(map), "a row for each token");
    require(!probs.defined() || probs.sizes() == map.sizes(), "probs", show(probs),
            "the shape of routingMap");
    const int64_t each = rows / map.size(padded ? 1 : 0);
    require(rows > 0 && each > 0, "numOutTokens", text(rows), "at least one for each of them");
    require(!padded || each <= map.size(0), "numOutTokens", text(rows),
            "at most as many for each expert as there are tokens");
    require(padded || each <= 512, "numOutTokens", text(rows), "at most 512 for each token");
    require(permuted->size(0) == each * map.size(padded ? 1 : 0), "permuteTokensOut",
            show(*permuted), "whole numbers of rows for each expert or token");
  }

  void run() const {
    const at::Tensor by_expert = map.ne(0).t().contiguous();
    const at::Tensor weights = probs.defined() ? probs.t().contiguous() : at::Tensor();
    if (padded) {  // the tokens of each expert first, in their order
      const at::Tensor order = at::argsort(by_expert.to(at::kInt), true, -1, true);
      const at::Tensor chosen = order.narrow(1, 0, rows / map.size(1)).contiguous();
      permuted = tokens.index_select(0, chosen.reshape({-1}));
      if (probs.defined()) permuted_probs = weights.gather(1, chosen).reshape({-1});
      sorted_indices = chosen.reshape({-1});
      return;
    }
    const at::Tensor token =
        at::arange(map.size(0)).expand({map.size(1), -1}).masked_select(by_expert);
    if (token.numel() != permuted->size(0))
      throw Fault(kKernelFault, "argument 'routingMap': found " + text(token.numel()) +
                                    " chosen experts, expected numOutTokens");
    permuted = tokens.index_select(0, token);
    if (probs.defined()) permuted_probs = weights.masked_select(by_expert);
    sorted_indices = at::argsort(token, true, 0, false);
  }
};

// mirror-cann/ops-transformer moe/moe_token_unpermute_with_routing_map/docs/
// aclnnMoeTokenUnpermuteWithRoutingMap.md. outIndex and permuteTokenId of the mode that is not
// padded: the indices and the tokens they belong to, our reading.
struct MapUnpermute {
  at::Tensor permuted, sorted_indices, map, probs;
  bool padded;
  std::vector<int64_t> restore_shape;
  Out unpermuted, out_index, token_id, permuted_probs;
  FIELDS(all, permuted, sorted_indices, map, probs, padded, restore_shape, unpermuted, out_index,
         token_id, permuted_probs)

  void check() const {
    const Types maps = {at::kBool, at::kChar};
    check_table({{"permutedTokens", permuted, true, kFloats, 2, 2, kDocument},
                 {"sortedIndices", sorted_indices, true, {kI32}, 1, 1, kDocument},
                 {"routingMap", map, probs.defined() && !padded, maps, 2, 2, kDocument},
                 {"probs", probs, false, kFloats, 2, 2, kDocument},
                 {"unpermutedTokens", *unpermuted, true, kFloats, 2, 2, kDocument},
                 {"outIndex", *out_index, true, {kI32}, 1, 1, kDocument},
                 {"permuteTokenId", *token_id, true, {kI32}, 1, 1, kDocument},
                 {"permuteProbs", *permuted_probs, probs.defined(), kFloats, 1, 1, kDocument}});
    require(permuted.size(0) == sorted_indices.numel(), "sortedIndices", show(sorted_indices),
            "a value for each row of permutedTokens");
    require(restore_shape.size() == 2 && unpermuted->size(0) == restore_shape[0] &&
                unpermuted->size(1) == restore_shape[1],
            "restoreShape", show(*unpermuted), "the shape of unpermutedTokens");
    require(!map.defined() || !probs.defined() || probs.sizes() == map.sizes(), "probs",
            show(probs), "the shape of routingMap");
  }

  at::Tensor weights_by_expert(In index) const {
    if (!padded) return probs.t().contiguous().masked_select(map.ne(0).t().contiguous());
    const int64_t experts = probs.size(1);
    return probs.t().contiguous().gather(1, index.view({experts, -1})).reshape({-1});
  }

  void run() const {
    const at::Tensor index = sorted_indices.to(at::kLong);
    const int64_t tokens = unpermuted->size(0), count = index.numel();
    expect_values(index, padded ? 0 : -1, padded ? tokens : count, "sortedIndices");
    at::Tensor rows = permuted.to(kF32);
    if (probs.defined()) {
      const at::Tensor weights = weights_by_expert(index);
      permuted_probs = weights;
      rows = rows.mul(weights.to(kF32).unsqueeze(-1));
    }
    const at::Tensor zero = at::zeros(unpermuted->sizes(), kF32);
    if (padded) {
      const auto [token, from] = at::sort(index, true, 0, false);
      unpermuted = zero.index_add_(0, index, rows);
      token_id = token, out_index = from;
      return;
    }
    const at::Tensor token = at::arange(count).floor_divide(std::max<int64_t>(count / tokens, 1));
    unpermuted = zero.index_add_(0, token, rows_or_zero(rows, index));
    token_id = token, out_index = index;
  }
};

at::Tensor masked(In shape, In map, In values) {  // of [tokens, experts], given expert by expert
  const at::Tensor by_expert = map.ne(0).t().contiguous();
  return at::zeros(by_expert.sizes(), shape.options()).masked_scatter(by_expert, values).t();
}

// mirror-cann/ops-transformer moe/moe_token_permute_with_routing_map_grad/docs/
// aclnnMoeTokenPermuteWithRoutingMapGrad.md
struct MapPermuteGradient {
  at::Tensor gradient, probs_gradient, sorted_indices, map;
  int64_t experts, tokens;
  bool padded;
  Out token_out, probs_out;
  FIELDS(all, gradient, probs_gradient, sorted_indices, map, experts, tokens, padded, token_out,
         probs_out)

  void check() const {
    const bool weighted = probs_gradient.defined();
    check_table({{"permutedTokensOutputGrad", gradient, true, kFloats, 2, 2, kDocument},
                 {"permutedProbsOutputGrad", probs_gradient, false, kFloats, 1, 1, kDocument},
                 {"sortedIndices", sorted_indices, true, {kI32}, 1, 1, kDocument},
                 {"routingMap", map, weighted && !padded, {at::kBool, kI8}, 2, 2, kDocument},
                 {"tokenGradOut", *token_out, true, kFloats, 2, 2, kDocument},
                 {"probsGradOut", *probs_out, weighted, kFloats, 2, 2, kDocument}});
    require(gradient.size(0) == sorted_indices.numel(), "sortedIndices", show(sorted_indices),
            "a value for each row of permutedTokensOutputGrad");
    require(token_out->size(0) == tokens && tokens > 0, "tokenGradOut", show(*token_out),
            "a row for each token");
  }

  void run() const {
    const at::Tensor index = sorted_indices.to(at::kLong);
    const int64_t rows = index.numel();
    expect_values(index, 0, padded ? tokens : rows, "sortedIndices");
    const at::Tensor zero = at::zeros(token_out->sizes(), kF32);
    if (padded) {
      token_out = zero.index_add_(0, index, gradient.to(kF32));
      if (!probs_gradient.defined()) return;
      const at::Tensor expert = at::arange(rows).floor_divide(rows / experts);
      probs_out = at::zeros(probs_out->sizes(), probs_gradient.options())
                      .index_put_({index, expert}, probs_gradient);
      return;
    }
    const at::Tensor token = at::arange(rows).floor_divide(std::max<int64_t>(rows / tokens, 1));
    token_out = zero.index_add_(0, token, rows_at(gradient, index));
    if (probs_gradient.defined()) probs_out = masked(probs_gradient, map, probs_gradient);
  }
};

// mirror-cann/ops-transformer moe/moe_token_unpermute_with_routing_map_grad/docs/
// aclnnMoeTokenUnpermuteWithRoutingMapGrad.md
struct MapUnpermuteGradient {
  at::Tensor gradient, out_index, token_id, map, permuted, probs;
  bool padded;
  std::vector<int64_t> restore_shape;
  Out permuted_out, probs_out;
  FIELDS(all, gradient, out_index, token_id, map, permuted, probs, padded, restore_shape,
         permuted_out, probs_out)

  void check() const {
    const bool weighted = probs.defined();
    check_table({{"unpermutedTokensGrad", gradient, true, kFloats, 2, 2, kDocument},
                 {"outIndex", out_index, true, {kI32}, 1, 1, kDocument},
                 {"permuteTokenId", token_id, true, {kI32}, 1, 1, kDocument},
                 {"routingMap", map, weighted && !padded, {at::kBool, kI8}, 2, 2, kDocument},
                 {"permutedTokens", permuted, weighted, kFloats, 2, 2, kDocument},
                 {"probs", probs, false, kFloats, 2, 2, kDocument},
                 {"permutedTokensGradOut", *permuted_out, true, kFloats, 2, 2, kDocument},
                 {"probsGradOut", *probs_out, weighted, kFloats, 2, 2, kDocument}});
    require(token_id.sizes() == out_index.sizes(), "permuteTokenId", show(token_id),
            "the shape of outIndex");
  }

  void run() const {
    const at::Tensor to = out_index.to(at::kLong), token = token_id.to(at::kLong);
    expect_values(to, 0, permuted_out->size(0), "outIndex");
    expect_values(token, 0, gradient.size(0), "permuteTokenId");
    const at::Tensor rows =
        at::zeros(permuted_out->sizes(), kF32).index_copy_(0, to, rows_at(gradient, token));
    if (!probs.defined()) return void(permuted_out = rows);
    const at::Tensor by_row = rows.mul(permuted.to(kF32)).sum(-1);
    const at::Tensor wide = probs.to(kF32);
    at::Tensor weights;
    if (padded) {
      const at::Tensor expert = to.floor_divide(to.numel() / probs.size(1));
      weights = at::zeros({to.numel()}, kF32).index_put_({to}, wide.index({token, expert}));
      probs_out =
          at::zeros(probs.sizes(), kF32).index_put_({token, expert}, by_row.index_select(0, to));
    } else {
      weights = wide.t().contiguous().masked_select(map.ne(0).t().contiguous());
      probs_out = masked(by_row, map, by_row);
    }
    permuted_out = rows.mul(weights.unsqueeze(-1));
  }
};

}  // namespace

NAMED(aclnnMoeTokenPermuteWithRoutingMapGrad, MapPermuteGradient, all, check, run)
NAMED(aclnnMoeTokenUnpermuteWithRoutingMapGrad, MapUnpermuteGradient, all, check, run)
NAMED(aclnnMoeTokenPermuteGrad, PermuteGradient, all, check, run)
NAMED(aclnnMoeTokenUnpermuteGrad, UnpermuteGradient, all, check, run)
NAMED(aclnnMoeTokenPermuteWithRoutingMap, MapPermute, all, check, run)
NAMED(aclnnMoeTokenUnpermuteWithRoutingMap, MapUnpermute, all, check, run)

}  // namespace softnpu
