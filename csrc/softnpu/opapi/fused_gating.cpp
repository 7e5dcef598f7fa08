// Gating by softmax, and the older routing of tokens to experts. Tables: argument, its tensor,
// required, dtypes, ranks, source.
#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include "check.h"

namespace softnpu {
namespace {

// mirror-cann/ops-transformer moe/moe_gating_top_k_softmax/docs/aclnnMoeGatingTopKSoftmax.md and
// moe/moe_gating_top_k_softmax_v2/docs/aclnnMoeGatingTopKSoftmaxV2.md
struct SoftmaxGate {
  at::Tensor x, finished;
  int64_t k, renorm = 0;
  bool output_softmax = false;
  Out y, expert_idx, row_idx, softmax;
  FIELDS(v1, x, finished, k, y, expert_idx, row_idx)
  FIELDS(v2, x, finished, k, renorm, output_softmax, y, expert_idx, softmax)

  void check_all() const {
    check_table({{"x", x, true, kFloats, 2, 3, kDocument},
                 {"finished", finished, false, {at::kBool}, 1, 2, kDocument},
                 {"yOut", *y, true, {x.defined() ? x.scalar_type() : kNone}, 2, 3, kDocument},
                 {"expertIdxOut", *expert_idx, true, {kI32}, 2, 3, kDocument}});
    require(k >= 1 && k <= x.size(-1) && k <= 1024, "k", text(k),
            "1 to the number of experts, at most 1024");
    require(!on_a5() || x.size(-1) <= 2048, "x", show(x), "at most 2048 experts");
    std::vector<int64_t> sizes = x.sizes().vec();
    sizes.pop_back();
    require(!finished.defined() || finished.sizes() == at::IntArrayRef(sizes), "finished",
            show(finished), "the shape of x without the experts");
    sizes.push_back(k);
    require(y->sizes() == at::IntArrayRef(sizes), "yOut", show(*y), "k values for each token");
    require(expert_idx->sizes() == y->sizes(), "expertIdxOut", show(*expert_idx),
            "the shape of yOut");
  }

  void check() const {
    check_all();
    check_table({{"rowIdxOut", *row_idx, true, {kI32}, 2, 3, kDocument}});
  }

  void check_v2() const {
    check_all();
    require(renorm == 0 || renorm == 1, "renorm", text(renorm), "0 or 1");
    const bool wanted = output_softmax && renorm == 0;
    check_table({{"softmaxResultOut", *softmax, wanted, {kF32}, 0, 3, kDocument}});
  }

  void run() const {
    const at::Tensor wide = x.to(kF32), p = at::softmax(wide, -1);
    // Equal scores: the smaller id first, our reading.
    const auto [values, order] = at::sort(renorm ? wide : p, true, -1, true);
    const at::Tensor best = values.slice(-1, 0, k);
    at::Tensor chosen = order.slice(-1, 0, k);
    if (finished.defined()) chosen = chosen.masked_fill(finished.unsqueeze(-1), x.size(-1));
    y = renorm ? at::softmax(best, -1) : best;
    expert_idx = chosen;
    if (output_softmax && renorm == 0) softmax = p;
    if (!row_idx) return;
    const int64_t rows = x.numel() / x.size(-1);
    row_idx = at::arange(rows * k).view({k, rows}).t().reshape(row_idx->sizes());
  }
};

// mirror-cann/ops-transformer moe/moe_init_routing/docs/aclnnMoeInitRouting.md
struct FirstRouting {
  at::Tensor x, row_idx, expert_idx;
  int64_t active_num;
  Out expanded_x, expanded_row_idx, expanded_expert_idx;
  FIELDS(all, x, row_idx, expert_idx, active_num, expanded_x, expanded_row_idx, expanded_expert_idx)

  void check() const {
    check_table({{"x", x, true, kFloats, 2, 2, kDocument},
                 {"rowIdx", row_idx, true, {kI32}, 2, 2, kDocument},
                 {"expertIdx", expert_idx, true, {kI32}, 2, 2, kDocument},
                 {"expandedXOut", *expanded_x, true, kFloats, 2, 2, kDocument},
                 {"expandedRowIdxOut", *expanded_row_idx, true, {kI32}, 1, 1, kDocument},
                 {"expandedExpertIdxOut", *expanded_expert_idx, true, {kI32}, 1, 1, kDocument}});
    require(expert_idx.sizes() == row_idx.sizes(), "expertIdx", show(expert_idx),
            "the shape of rowIdx");
    require(x.size(0) == row_idx.size(0), "rowIdx", show(row_idx), "a row for each row of x");
    require(active_num >= 0, "activeNum", text(active_num), "no negative number");
    const int64_t kept = std::min(x.size(0), active_num) * expert_idx.size(1);
    require(expanded_x->size(0) == kept && expanded_x->size(1) == x.size(1), "expandedXOut",
            show(*expanded_x), "[min(rows, activeNum) * k, H]");
  }

  void run() const {
    const auto [experts, place] = at::sort(expert_idx.reshape({-1}), true, 0, false);
    const at::Tensor rows = row_idx.reshape({-1}).index_select(0, place).to(at::kLong);
    expect_values(rows, 0, row_idx.numel(), "rowIdx");
    expanded_expert_idx = experts;
    expanded_row_idx.touch();
    expanded_row_idx->index_copy_(0, rows, at::arange(rows.numel(), kI32));
    expanded_x = x.index_select(0, rows.slice(0, 0, expanded_x->size(0)).remainder(x.size(0)));
  }
};

// mirror-cann/ops-transformer moe/moe_re_routing (README): rows that came rank by rank are put
// expert by expert.
struct ReRouting {
  at::Tensor tokens, counts, scales;
  int64_t expert_token_num_type, idx_type;
  Out permuted, permuted_scales, permuted_idx, expert_counts;
  FIELDS(all, tokens, counts, scales, expert_token_num_type, idx_type, permuted, permuted_scales,
         permuted_idx, expert_counts)

  void check() const {
    const Types rows = {kF16, kBF16, kI8, kE4M3, kE5M2, kE2M1}, ints = {kI32, at::kLong};
    check_table({{"tokens", tokens, true, rows, 2, 2, kDocument},
                 {"expertTokenNumPerRank", counts, true, ints, 2, 2, kDocument},
                 {"perTokenScales", scales, false, {kF32, kE8M0}, 1, 3, kDocument},
                 {"permuteTokensOut", *permuted, true, rows, 2, 2, kDocument},
                 {"permutePerTokenScalesOut",
                  *permuted_scales,
                  scales.defined(),
                  {kF32, kE8M0},
                  1,
                  3,
                  kDocument},
                 {"permuteTokenIdxOut", *permuted_idx, true, {kI32}, 1, 1, kDocument},
                 {"expertTokenNumOut", *expert_counts, true, ints, 1, 1, kDocument}});
    require(expert_token_num_type == 1, "expertTokenNumType", text(expert_token_num_type),
            "1 (counts)");
    require(idx_type == 0 || (idx_type == 1 && on_a5()), "idxType", text(idx_type),
            "0 (gather), or 1 (scatter) on Ascend 950");
    require(!scales.defined() || scales.size(0) == tokens.size(0), "perTokenScales", show(scales),
            "a value for each token");
  }

  // Where the row of each place comes from.
  at::Tensor sources() const {
    const at::Tensor table = counts.to(at::kLong).contiguous();
    expect_values(table, 0, tokens.size(0) + 1, "expertTokenNumPerRank");
    const int64_t ranks = table.size(0), experts = table.size(1);
    const at::Tensor flat = table.view({-1}), first = flat.cumsum(0).sub(flat).view({ranks, -1});
    std::vector<at::Tensor> runs;
    for (int64_t e = 0; e < experts; ++e)
      for (int64_t r = 0; r < ranks; ++r) {
        const int64_t begin = first[r][e].item<int64_t>(), count = table[r][e].item<int64_t>();
        runs.push_back(at::arange(begin, begin + count));
      }
    return at::cat(runs);
  }

  void run() const {
    const at::Tensor from = sources();
    // Counts that do not make the rows: undefined by the document, a fault here.
    expect_values(at::zeros({1}, at::kLong).add(from.numel()), tokens.size(0), tokens.size(0) + 1,
                  "expertTokenNumPerRank");
    const auto bytes = [](In x) { return x.view({x.size(0), -1}).view(at::kByte); };
    permuted.touch();
    bytes(*permuted).copy_(bytes(tokens.contiguous()).index_select(0, from));
    if (scales.defined()) {
      permuted_scales.touch();
      bytes(*permuted_scales).copy_(bytes(scales.contiguous()).index_select(0, from));
    }
    const at::Tensor back =
        at::empty({from.numel()}, at::kLong).index_copy_(0, from, at::arange(from.numel()));
    permuted_idx = idx_type == 0 ? from : back;
    expert_counts = counts.sum(0);
  }
};

}  // namespace

NAMED(aclnnMoeGatingTopKSoftmax, SoftmaxGate, v1, check, run)
NAMED(aclnnMoeGatingTopKSoftmaxV2, SoftmaxGate, v2, check_v2, run)
NAMED(aclnnMoeInitRouting, FirstRouting, all, check, run)
NAMED(aclnnMoeReRouting, ReRouting, all, check, run)

}  // namespace softnpu
