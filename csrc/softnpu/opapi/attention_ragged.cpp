// FlashAttentionScore of sequences that lie behind each other: layout TND, with their ends.
// mirror-cann/ops-transformer attention/flash_attention_score/docs/
// aclnnFlashAttentionVarLenScoreV4.md and attention/flash_attention_score_grad/docs/
// aclnnFlashAttentionUnpaddingScoreGradV4.md
#include <ATen/ops/arange.h>
#include <ATen/ops/bitwise_left_shift.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "attention.h"
#include "fused_quant.h"
#include "random.h"

namespace softnpu {
namespace {

struct Ragged {
  at::Tensor q, k, v, gradient, pse, drop, padding, mask, largest_in, sum_in, softmax_in, attention;
  std::vector<int64_t> prefix, query_ends, key_ends;
  double scale, keep;
  int64_t before, after, heads;
  std::string layout;
  int64_t inner_precise, sparse;
  std::string softmax_layout;
  Out largest, sum, softmax, out, dq, dk, dv, dpse;
  FIELDS(inputs, q, k, v)
  FIELDS(masks, pse, drop, padding, mask)
  FIELDS(saved, largest_in, sum_in, softmax_in, attention)
  FIELDS(settings, prefix, query_ends, key_ends, scale, keep, before, after, heads, layout,
         inner_precise, sparse)
  FIELDS(how, softmax_layout)
  FIELDS(results, largest, sum, softmax, out)
  FIELDS(given, gradient)
  FIELDS(gradients, dq, dk, dv, dpse)
  auto v1() { return inputs() + masks() + settings() + results(); }
  auto v4() { return inputs() + masks() + settings() + how() + results(); }
  auto grad_v1() { return inputs() + given() + masks() + saved() + settings() + gradients(); }
  auto grad_v4() { return grad_v1() + how(); }

  std::optional<at::Tensor> optional(In x) const {
    return x.defined() && x.numel() ? std::optional(x) : std::nullopt;
  }

  void check_ends(const char* argument, const std::vector<int64_t>& ends, In x) const {
    const bool rising = std::is_sorted(ends.begin(), ends.end());
    require(!ends.empty() && ends.front() >= 0 && rising && ends.back() == x.size(0), argument,
            ends.empty() ? "nothing" : text(ends.back()) + " as the last end",
            "rising ends, the last one the tokens of the tensor");
  }

  bool rows_first() const { return softmax_layout == "TND" || softmax_layout == "same_as_input"; }

  void check() const {
    const Types types = {kF16, kBF16, kF32};
    check_table({{"query", q, true, types, 3, 3, kDocument},
                 {"key", k, true, {q.defined() ? q.scalar_type() : kNone}, 3, 3, kDocument},
                 {"value", v, true, {q.defined() ? q.scalar_type() : kNone}, 3, 3, kDocument}});
    require(layout == "TND", "inputLayout", layout, "TND");
    require(softmax_layout.empty() || rows_first(), "softmaxLayout", softmax_layout,
            "TND, same_as_input (as torch_npu writes TND) or an empty one");
    check_ends("actualSeqQLen", query_ends, q);
    check_ends("actualSeqKvLen", key_ends, k);
    require(query_ends.size() == key_ends.size(), "actualSeqKvLen",
            text(static_cast<int64_t>(key_ends.size())) + " ends", "one for each of actualSeqQLen");
    require(q.size(1) == heads && k.size(1) > 0 && heads % k.size(1) == 0, "key", show(k),
            "heads that divide headNum");
    setting();
  }

  AttentionSetting setting() const {
    return attention_setting(scale, keep, before, after, heads, "BNSD", sparse, optional(pse),
                             optional(drop));
  }

  struct Span {
    int64_t query, queries, key, keys, bit;
  };
  std::vector<Span> spans() const {
    std::vector<Span> result;
    Span s{0, 0, 0, 0, 0};
    for (size_t i = 0; i < query_ends.size(); ++i) {
      s.bit += heads * s.queries * s.keys;
      s.query += s.queries, s.key += s.keys;
      s.queries = query_ends[i] - s.query, s.keys = key_ends[i] - s.key;
      result.push_back(s);
    }
    return result;
  }

  static at::Tensor part(In x, int64_t first, int64_t count) {  // [1, N, S, D], a view
    return x.slice(0, first, first + count).transpose(0, 1).unsqueeze(0);
  }

  // Bits of one sequence, from its first one on.
  std::optional<at::Tensor> bits(const Span& s) const {
    if (!optional(drop)) return std::nullopt;
    const int64_t count = heads * s.queries * s.keys;
    const at::Tensor all = bits_as_bool(drop, {drop.numel() * 8});
    return packed(all.slice(0, s.bit, s.bit + count));
  }
  static at::Tensor packed(In bools) {
    const int64_t bytes = (bools.numel() + 7) / 8;
    at::Tensor result = at::zeros({bytes * 8}, at::kByte);
    result.slice(0, 0, bools.numel()).copy_(bools);
    const at::Tensor weight =
        at::bitwise_left_shift(at::ones({8}, at::kInt), at::arange(8, at::kInt));
    return result.view({bytes, 8}).to(at::kInt).mul(weight).sum(1).to(at::kByte);
  }

  // Where the statistics [N, S, 8] of a sequence lie: rows of tokens, or its own block.
  at::Tensor statistics(const Out& x, const Span& s) const {
    const at::Tensor rows = x->slice(0, s.query, s.query + s.queries);
    return rows_first() ? rows.transpose(0, 1) : rows.view({heads, s.queries, -1});
  }

  void run() const {
    const AttentionSetting how = setting();
    largest.touch(), sum.touch(), out.touch();
    for (const Span& s : spans()) {
      if (s.queries == 0) continue;
      const auto single = [&] { return at::empty({1, heads, s.queries, 8}, kF32); };
      const Out most(single()), total(single()), result(part(*out, s.query, s.queries));
      attention_forward(part(q, s.query, s.queries), part(k, s.key, s.keys), part(v, s.key, s.keys),
                        optional(mask), bits(s), how, most, total, result);
      statistics(largest, s).copy_((*most)[0]);
      statistics(sum, s).copy_((*total)[0]);
    }
  }

  void run_gradient() const {
    const AttentionSetting how = setting();
    dq.touch(), dk.touch(), dv.touch();
    for (const Span& s : spans()) {
      if (s.queries == 0) continue;
      attention_backward(part(q, s.query, s.queries), part(k, s.key, s.keys),
                         part(v, s.key, s.keys), part(gradient, s.query, s.queries), optional(mask),
                         bits(s), how, Out(part(*dq, s.query, s.queries)),
                         Out(part(*dk, s.key, s.keys)), Out(part(*dv, s.key, s.keys)));
    }
  }
};

}  // namespace

NAMED(aclnnFlashAttentionVarLenScore, Ragged, v1, check, run)
NAMED(aclnnFlashAttentionVarLenScoreV4, Ragged, v4, check, run)
NAMED(aclnnFlashAttentionUnpaddingScoreGrad, Ragged, grad_v1, check, run_gradient)
NAMED(aclnnFlashAttentionUnpaddingScoreGradV4, Ragged, grad_v4, check, run_gradient)

}  // namespace softnpu
