// Attention over chosen blocks of keys, its gradient, and the normaliser of a dense indexer.
// Tables: argument, its tensor, required, dtypes, ranks, source.
#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/where.h>

#include <limits>

#include "fused_family.h"

namespace softnpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const Types kMasks = {at::kBool, kI8, at::kByte};

// Ends of sequences in [T, N, D], or all of the batches of [B, N, S, D] and [B, S, N, D].
struct Layout {
  std::string name;
  bool tokens() const { return name == "TND"; }
  int64_t heads(In x) const { return x.size(name == "BSND" ? 2 : 1); }
  int64_t sequences(In x, const std::vector<int64_t>& ends) const {
    return tokens() ? static_cast<int64_t>(ends.size()) : x.size(0);
  }
  // [N, S, D] of one sequence, a view
  at::Tensor sequence(In x, const std::vector<int64_t>& ends, int64_t i) const {
    if (name == "BNSD") return x[i];
    if (name == "BSND") return x[i].transpose(0, 1);
    const auto at = static_cast<size_t>(i);
    const int64_t begin = i ? ends[at - 1] : 0;
    return x.slice(0, begin, ends[at]).transpose(0, 1);
  }
};

// mirror-cann/ops-transformer attention/block_sparse_attention/docs/aclnnBlockSparseAttention.md
// and attention/block_sparse_attention_grad/docs/aclnnBlockSparseAttentionGrad.md. Query heads
// share key heads in groups of neighbours (our reading).
struct BlockSparse {
  at::Tensor gradient, query, key, value, attention, lse_in, blocks, mask;
  std::vector<int64_t> block_shape;
  std::vector<int64_t> query_ends, key_ends;  // as the call gives them: ends (TND) or lengths
  at::Tensor table;
  std::string query_layout, key_layout;
  int64_t key_heads, mask_type;
  double scale;
  int64_t inner_precise = 0, block_size = 0, before, after, lse_flag = 0;
  Out out, lse, dq, dk, dv;
  FIELDS(forward, query, key, value, blocks, mask, block_shape, query_ends, key_ends, table,
         query_layout, key_layout, key_heads, mask_type, scale, inner_precise, block_size, before,
         after, lse_flag, out, lse)
  FIELDS(backward, gradient, query, key, value, attention, lse_in, blocks, mask, block_shape,
         query_ends, key_ends, query_layout, key_layout, key_heads, mask_type, scale, before, after,
         dq, dk, dv)

  int64_t rows() const { return block_shape[0]; }
  int64_t columns() const { return block_shape[1]; }

  void check_common() const {
    const auto type = query.defined() ? query.scalar_type() : kNone;
    check_table({{"query", query, true, kHalves, 3, 4, kDocument},
                 {"key", key, true, {type}, 3, 4, kDocument},
                 {"value", value, true, {type}, 3, 4, kDocument},
                 {"blockSparseMask", blocks, true, kMasks, 4, 4, kDocument},
                 {"attenMask", mask, false, {kNone}, 0, 0, kDocument}});
    require(query_layout == "TND" || query_layout == "BNSD" || (on_a5() && query_layout == "BSND"),
            "qInputLayout", query_layout, "TND or BNSD (on Ascend 950 also BSND)");
    require(key_layout == query_layout, "kvInputLayout", key_layout, "the layout of query");
    require(block_shape.size() >= 2 && rows() > 0 && columns() > 0 && columns() % 128 == 0,
            "blockShape", text(static_cast<int64_t>(block_shape.size())) + " values",
            "rows and columns of a block, the columns a multiple of 128");
    require(mask_type == 0, "maskType", text(mask_type), "0");
    const Layout layout{query_layout};
    require(!layout.tokens() || (!query_ends.empty() && query_ends.size() == key_ends.size()),
            "actualSeqLengths", text(static_cast<int64_t>(query_ends.size())) + " values",
            "ends for both sides with TND");
    require(query_ends.empty() == key_ends.empty(), "actualSeqLengthsKv",
            text(static_cast<int64_t>(key_ends.size())) + " values", "both lengths or none");
    const int64_t heads = layout.heads(query), groups = layout.heads(key);
    require(groups > 0 && heads % groups == 0, "key", show(key),
            "heads that divide those of query");
    require(blocks.size(1) == heads && blocks.size(0) == layout.sequences(query, query_ends),
            "blockSparseMask", show(blocks), "[sequences, heads, blocks, blocks]");
  }

  void check() const {
    check_common();
    require(lse_flag == 0 || lse_flag == 1, "softmaxLseFlag", text(lse_flag), "0 or 1");
    require(block_size == 0, "blockSize", text(block_size), "0");
    require(!table.defined(), "blockTable", "a tensor", "nothing");
    require(on_a5() ? inner_precise == 4 : inner_precise == 0 || inner_precise == 1, "innerPrecise",
            text(inner_precise), "0 or 1 (4 on Ascend 950)");
  }

  void check_backward() const { check_common(); }

  struct Part {  // of one sequence: [N, S, D] in fp32, [N, Sq, Sk]
    at::Tensor q, k, v, logits;
  };
  Part part(int64_t i) const {
    const Layout layout{query_layout};
    const int64_t group = layout.heads(query) / layout.heads(key);
    const auto keys = [&](In x) {
      return layout.sequence(x, key_ends, i).to(kF32).repeat_interleave(group, 0);
    };
    Part p{layout.sequence(query, query_ends, i).to(kF32), keys(key), keys(value), {}};
    const int64_t height = p.q.size(1), width = p.k.size(1);
    const at::Tensor chosen = blocks[i]
                                  .ne(0)
                                  .repeat_interleave(rows(), 1)
                                  .repeat_interleave(columns(), 2)
                                  .slice(1, 0, height)
                                  .slice(2, 0, width);
    p.logits = at::matmul(p.q, p.k.transpose(-1, -2))
                   .mul(scale)
                   .masked_fill(chosen.logical_not(), -kInfinity);
    if (!layout.tokens() && !key_ends.empty()) {  // lengths: what is behind takes no part
      const int64_t length = key_ends[key_ends.size() == 1 ? 0 : static_cast<size_t>(i)];
      p.logits = p.logits.masked_fill(at::arange(width).ge(length), -kInfinity);
    }
    return p;
  }

  static at::Tensor probabilities(In logits, at::Tensor* log_sum) {
    const at::Tensor most = at::amax(logits, {-1}, true).clamp_min(-1e30);
    const at::Tensor e = at::exp(logits.sub(most)), sum = e.sum(-1, true);
    if (log_sum) *log_sum = at::where(sum.eq(0), kInfinity, most.add(at::log(sum)));
    return e.div(at::where(sum.eq(0), 1.0, sum));  // a row without keys gives zeros
  }

  void run() const {
    const Layout layout{query_layout};
    out.touch();
    const bool with_lse = lse_flag == 1 && lse && lse->numel();
    if (with_lse) lse.touch();
    for (int64_t i = 0; i < layout.sequences(query, query_ends); ++i) {
      const Part p = part(i);
      at::Tensor log_sum;
      const at::Tensor weights = probabilities(p.logits, &log_sum);
      layout.sequence(*out, query_ends, i).copy_(at::matmul(weights, p.v));
      if (with_lse) layout.sequence(*lse, query_ends, i).copy_(log_sum);
    }
  }

  void run_backward() const {
    const Layout layout{query_layout};
    dq.touch(), dk.touch(), dv.touch();
    const int64_t groups = layout.heads(key), group = layout.heads(query) / groups;
    for (int64_t i = 0; i < layout.sequences(query, query_ends); ++i) {
      const Part p = part(i);
      const at::Tensor weights = probabilities(p.logits, nullptr);
      const at::Tensor g = layout.sequence(gradient, query_ends, i).to(kF32);
      const at::Tensor dp = at::matmul(g, p.v.transpose(-1, -2));
      const at::Tensor ds = weights.mul(dp.sub(dp.mul(weights).sum(-1, true))).mul(scale);
      const auto joined = [&](In x) { return x.unflatten(0, {groups, group}).sum(1); };
      layout.sequence(*dq, query_ends, i).copy_(at::matmul(ds, p.k));
      layout.sequence(*dk, key_ends, i).copy_(joined(at::matmul(ds.transpose(-1, -2), p.q)));
      layout.sequence(*dv, key_ends, i).copy_(joined(at::matmul(weights.transpose(-1, -2), g)));
    }
  }
};

// mirror-cann/ops-transformer attention/dense_lightning_indexer_softmax_lse/docs/
// aclnnDenseLightningIndexerSoftmaxLse.md
struct DenseSoftmax {
  at::Tensor query, key, weight;
  std::vector<int64_t> query_ends, key_ends;
  std::string layout_name;
  int64_t sparse_mode, before, after;
  Out most, sum;
  FIELDS(all, query, key, weight, query_ends, key_ends, layout_name, sparse_mode, before, after,
         most, sum)

  void check() const {
    const auto type = query.defined() ? query.scalar_type() : kNone;
    check_table({{"queryIndex", query, true, kHalves, 3, 4, kDocument},
                 {"keyIndex", key, true, {type}, 3, 4, kDocument},
                 {"weight", weight, true, {type, kF32}, 2, 3, kDocument},
                 {"softmaxMaxOut", *most, true, {kF32}, 2, 3, kDocument},
                 {"softmaxSumOut", *sum, true, {kF32}, 2, 3, kDocument}});
    require(layout_name == "BSND" || layout_name == "TND", "layout", layout_name, "BSND or TND");
    require(sparse_mode == 3, "sparseMode", text(sparse_mode), "3");
    const Layout layout{layout_name};
    require(layout.heads(key) == 1, "keyIndex", show(key), "one head");
    require(!layout.tokens() || (!query_ends.empty() && query_ends.size() == key_ends.size()),
            "actualSeqLengthsQuery", text(static_cast<int64_t>(query_ends.size())) + " values",
            "ends for both sides with TND");
    require(most->numel() == query.numel() / query.size(-1) / layout.heads(query), "softmaxMaxOut",
            show(*most), "a value for each query");
  }

  void run() const {
    const Layout layout{layout_name};
    most.touch(), sum.touch();
    int64_t done = 0;
    for (int64_t i = 0; i < layout.sequences(query, query_ends); ++i) {
      const at::Tensor q = layout.sequence(query, query_ends, i).to(kF32);
      const at::Tensor k = layout.sequence(key, key_ends, i).to(kF32);
      const int64_t rows = q.size(1), columns = k.size(1);
      const at::Tensor w = layout.tokens() ? weight.slice(0, done, done + rows) : weight[i];
      const at::Tensor scores =
          at::relu(at::matmul(q, k.transpose(-1, -2))).mul(w.to(kF32).t().unsqueeze(-1)).sum(0);
      const at::Tensor last = at::arange(rows).unsqueeze(1).add(columns - rows);
      const at::Tensor seen = scores.masked_fill(at::arange(columns).gt(last), -kInfinity);
      const at::Tensor largest = at::amax(seen, {-1}, true);
      most->view({-1}).slice(0, done, done + rows).copy_(largest.squeeze(-1));
      sum->view({-1}).slice(0, done, done + rows).copy_(at::exp(seen.sub(largest)).sum(-1));
      done += rows;
    }
  }
};

}  // namespace

NAMED(aclnnBlockSparseAttention, BlockSparse, forward, check, run)
NAMED(aclnnBlockSparseAttentionGrad, BlockSparse, backward, check_backward, run_backward)
NAMED(aclnnDenseLightningIndexerSoftmaxLse, DenseSoftmax, all, check, run)

}  // namespace softnpu
