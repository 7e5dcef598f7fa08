// FlashAttentionScore as scaled_dot_product_attention and npu_fusion_attention call it: layouts
// BNSD, BSND, BSH, SBH.
#include "attention.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/triu.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "random.h"

namespace softnpu {
namespace {

using Setting = AttentionSetting;

at::Tensor to_heads(In x, const std::string& layout, int64_t heads) {  // [B, N, S, D]
  if (layout == "BNSD") return x;
  if (layout == "BSND") return x.transpose(1, 2);
  if (layout == "BSH") return x.view({x.size(0), x.size(1), heads, -1}).transpose(1, 2);
  return x.view({x.size(0), x.size(1), heads, -1}).permute({1, 2, 0, 3});  // SBH
}

at::Tensor from_heads(In x, const std::string& layout) {
  if (layout == "BNSD") return x;
  if (layout == "BSND") return x.transpose(1, 2);
  if (layout == "BSH") return x.transpose(1, 2).reshape({x.size(0), x.size(2), -1});
  return x.permute({2, 0, 1, 3}).reshape({x.size(2), x.size(0), -1});
}

int64_t key_heads(In query, In key, const Setting& s) {
  if (s.layout == "BNSD") return key.size(1);
  if (s.layout == "BSND") return key.size(2);
  return key.size(2) / (query.size(2) / s.heads);
}

// True where a key is excluded. sparse 0: the given mask; 2: causal, aligned left up; 3: causal,
// aligned right down.
at::Tensor excluded(OptionalIn mask, const Setting& s, int64_t queries, int64_t keys) {
  if (s.sparse == 0 || s.sparse == 1)
    return mask ? mask->to(at::kBool) : at::zeros({queries, keys}, at::kBool);
  return at::triu(at::ones({queries, keys}, at::kBool), 1 + (s.sparse == 3 ? keys - queries : 0));
}

struct Scores {
  at::Tensor q, k, v, p, largest, sum;  // [B, N, S, ...], fp32 at least
  at::Tensor kept;  // factors of dropout [B, N, Sq, Sk], 0 or 1 / keepProb; undefined without it
  at::Tensor dropped(In x) const { return kept.defined() ? x.mul(kept) : x; }
};

Scores score(In query, In key, In value, OptionalIn mask, OptionalIn drop, const Setting& s) {
  const auto compute = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t groups = key_heads(query, key, s);
  Scores r;
  r.q = to_heads(query, s.layout, s.heads).to(compute);
  r.k = to_heads(key, s.layout, groups).to(compute).repeat_interleave(s.heads / groups, 1);
  r.v = to_heads(value, s.layout, groups).to(compute).repeat_interleave(s.heads / groups, 1);
  const at::Tensor logits = at::matmul(r.q, r.k.transpose(-1, -2)).mul(s.scale);
  const at::Tensor hidden = excluded(mask, s, r.q.size(2), r.k.size(2));
  const at::Tensor kept = logits.masked_fill(hidden, -std::numeric_limits<double>::infinity());
  r.largest = at::amax(kept, {-1}, true).clamp_min(-1e30);
  const at::Tensor e = at::exp(kept.sub(r.largest));
  r.sum = e.sum(-1, true);
  r.p = at::where(r.sum.eq(0), at::zeros({}, e.options()), e.div(r.sum));
  if (drop && drop->numel()) r.kept = bits_as_bool(*drop, r.p.sizes()).to(compute).div(s.keep);
  return r;
}

}  // namespace

Setting attention_setting(double scale, double keep, int64_t before, int64_t after, int64_t heads,
                          Text layout, int64_t sparse, OptionalIn pse, OptionalIn drop) {
  if (keep <= 0 || keep > 1)
    throw Fault(kNnParameter, "keepProb: found " + shown(keep) + ", expected 0 to 1");
  if (keep < 1 && !(drop && drop->numel()))
    throw Fault(kNnParameter, "dropMask: found nothing, expected bits, as keepProb is below 1");
  if (pse) throw Fault(kNnParameter, "pse (position shift) is not emulated");
  if (sparse < 0 || sparse > 3)
    throw Fault(kNnParameter, "sparseMode " + std::to_string(sparse) + " is not emulated");
  if (layout != "BNSD" && layout != "BSND" && layout != "BSH" && layout != "SBH")
    throw Fault(kNnParameter, "inputLayout " + layout + " is not emulated");
  if (sparse == 0 && (before < 65535 || after < 65535))
    throw Fault(kNnParameter, "a band by preTokens and nextTokens is not emulated");
  return {scale, keep, before, after, heads, sparse, layout};
}

void attention_forward(In q, In k, In v, OptionalIn mask, OptionalIn drop, const Setting& s,
                       Out largest, Out sum, Out o) {
  const Scores r = score(q, k, v, mask, drop, s);
  largest = r.largest.expand({-1, -1, -1, 8});
  sum = r.sum.expand({-1, -1, -1, 8});
  o = from_heads(at::matmul(r.dropped(r.p), r.v), s.layout);
}

namespace {

at::Tensor sum_groups(In x, int64_t groups) {  // [B, N, S, D] -> [B, groups, S, D]
  return x.reshape({x.size(0), groups, x.size(1) / groups, x.size(2), x.size(3)}).sum(2);
}

}  // namespace

void attention_backward(In q, In k, In v, In gradient, OptionalIn mask, OptionalIn drop,
                        const Setting& s, Out dq, Out dk, Out dv) {
  const Scores r = score(q, k, v, mask, drop, s);
  const int64_t groups = key_heads(q, k, s);
  const at::Tensor g = to_heads(gradient, s.layout, s.heads).to(r.p.scalar_type());
  const at::Tensor dp = r.dropped(at::matmul(g, r.v.transpose(-1, -2)));
  const at::Tensor ds = r.p.mul(dp.sub(dp.mul(r.p).sum(-1, true))).mul(s.scale);
  dq = from_heads(at::matmul(ds, r.k), s.layout);
  dk = from_heads(sum_groups(at::matmul(ds.transpose(-1, -2), r.q), groups), s.layout);
  dv = from_heads(sum_groups(at::matmul(r.dropped(r.p).transpose(-1, -2), g), groups), s.layout);
}

OP(aclnnFlashAttentionScore, [](In q, In k, In v, OptionalIn pse, OptionalIn drop, OptionalIn,
                                OptionalIn mask, Ints, double scale, double keep, int64_t before,
                                int64_t after, int64_t heads, Text layout, int64_t, int64_t sparse,
                                Out largest, Out sum, OptionalOut, Out o) {
  attention_forward(q, k, v, mask, drop,
                    attention_setting(scale, keep, before, after, heads, layout, sparse, pse, drop),
                    largest, sum, o);
})
OP(aclnnFlashAttentionScoreV4,
   [](In q, In k, In v, OptionalIn pse, OptionalIn drop, OptionalIn, OptionalIn mask, OptionalIn,
      OptionalIn, OptionalIn, OptionalIn, OptionalIn, OptionalIn, Ints, Ints, Ints, Ints, Ints,
      double scale, double keep, int64_t before, int64_t after, int64_t heads, Text layout, int64_t,
      int64_t sparse, int64_t, int64_t, Text, int64_t, int64_t, Out largest, Out sum, OptionalOut,
      Out o) {
     attention_forward(
         q, k, v, mask, drop,
         attention_setting(scale, keep, before, after, heads, layout, sparse, pse, drop), largest,
         sum, o);
   })
OP(aclnnFlashAttentionScoreGrad, [](In q, In k, In v, In g, OptionalIn pse, OptionalIn drop,
                                    OptionalIn, OptionalIn mask, OptionalIn, OptionalIn, OptionalIn,
                                    OptionalIn, Ints, double scale, double keep, int64_t before,
                                    int64_t after, int64_t heads, Text layout, int64_t,
                                    int64_t sparse, Out dq, Out dk, Out dv, OptionalOut) {
  attention_backward(
      q, k, v, g, mask, drop,
      attention_setting(scale, keep, before, after, heads, layout, sparse, pse, drop), dq, dk, dv);
})
OP(aclnnFlashAttentionScoreGradV4,
   [](In q, In k, In v, In g, OptionalIn pse, OptionalIn drop, OptionalIn, OptionalIn mask,
      OptionalIn, OptionalIn, OptionalIn, OptionalIn, OptionalIn, OptionalIn, OptionalIn,
      OptionalIn, OptionalIn, OptionalIn, OptionalIn, OptionalIn, Ints, Ints, Ints, Ints, Ints,
      double scale, double keep, int64_t before, int64_t after, int64_t heads, Text layout, Text,
      int64_t, int64_t sparse, int64_t, int64_t, int64_t, int64_t, Out dq, Out dk, Out dv,
      OptionalOut, OptionalOut, OptionalOut, OptionalOut) {
     attention_backward(
         q, k, v, g, mask, drop,
         attention_setting(scale, keep, before, after, heads, layout, sparse, pse, drop), dq, dk,
         dv);
   })

}  // namespace softnpu
