// Attention over chosen keys. Tables: argument, required, dtypes, ranks, source.
#include <ATen/ops/amax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include "fused_sparse_layout.h"

namespace softnpu::sparse {
namespace {

const Types kInt32 = {at::kInt};
constexpr int64_t kWidth = 512, kRope = 64, kTile = 128;  // of a head, of its rotated part, of one dequantisation scale

struct Attention {
  Layout layout;
  double scale;
  int64_t block, sparse_mode;
  at::Tensor indices, sinks;
};

Attention attention(In query_lengths, In key_lengths, In blocks, Text query, Text key, double scale, int64_t block,
                    int64_t mode, In indices, In sinks) {
  return {{query, key, query_lengths, key_lengths, blocks, "layout_kv", "actual_seq_lengths_kv"},
          scale,
          block,
          mode,
          indices,
          sinks};
}

bool power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

void check_like(In x, const char* name, In other, int64_t width) {
  std::vector<int64_t> expected = other.sizes().vec();
  expected.back() = width;
  require(x.sizes() == at::IntArrayRef(expected), name, show(x), "the other dimensions of query (of key), 64 wide");
}

// What both attentions limit: heads, indices, block of indices, modes; V is K (MLA-absorb).
void check_common(const Attention& s, In query, In key, In value, int64_t largest_block, int64_t before, int64_t after,
                  int64_t attention_mode) {
  check_layout(s.layout, query, key);
  const int64_t heads = query.size(-2);
  require(heads <= 128 && (on_a5() || power_of_two(heads)), "query", show(query),
          "up to 128 heads, a power of two on A2 and A3");
  std::vector<int64_t> rows = query.sizes().vec();
  rows[rows.size() - 2] = 1;
  rows.back() = s.indices.size(-1);
  require(s.indices.sizes() == at::IntArrayRef(rows) && rows.back() > 0, "sparse_indices", show(s.indices),
          "query's rows, one head, and at least one index");
  require(value.sizes() == key.sizes() && value.scalar_type() == key.scalar_type(), "value", show(value),
          "shape and dtype of key");
  require(power_of_two(s.block) && s.block <= (on_a5() ? 1 : largest_block), "sparse_block_size",
          std::to_string(s.block), "1; on A2 and A3 a power of two, up to 128 (16 with quantised keys)");
  require(!paged(s.layout) || key.size(1) % s.block == 0, "sparse_block_size", std::to_string(s.block),
          "a divisor of the block size");
  require(attention_mode == 2, "attention_mode", std::to_string(attention_mode), "2 (MLA-absorb)");
  check_modes(s.sparse_mode, before, after);
  check_plain(query, "query");
  check_plain(s.indices, "sparse_indices");
  check_cache(s.layout, key, "key");
  check_cache(s.layout, value, "value");
}

// hicann/ops-transformer attention/sparse_flash_attention/docs/aclnnSparseFlashAttention.md and ...V2.md (sinks);
// torchapi_sparse_flash_attention.md says what mode 2 needs (both rope parts, V the same data as K) and allows gaps
// between pages on A5. Our reading: A2 and A3 need the rope parts too; sinks with pages are allowed (no document says
// otherwise, CANN's test script leaves them out).
void check_attention(const Attention& s, In query, In key, In value, In query_rope, In key_rope, int64_t before,
                     int64_t after, int64_t attention_mode, bool lse) {
  const Source rope = on_a5() ? kDocument : kReading;
  require(value.defined(), "value", "nothing", "a tensor (None, possible from CANN 9.2 on, is not emulated)");
  check_table({{"query", true, kHalves, 3, 4, kDocument},
               {"key", true, kHalves, 3, 4, kDocument},
               {"value", true, kHalves, 3, 4, kDocument},
               {"sparse_indices", true, kInt32, 3, 4, kDocument},
               {"block_table", false, kInt32, 2, 2, kDocument},
               {"actual_seq_lengths_query", false, kInt32, 1, 1, kDocument},
               {"actual_seq_lengths_kv", false, kInt32, 1, 1, kDocument},
               {"query_rope", true, kHalves, 3, 4, rope},
               {"key_rope", true, kHalves, 3, 4, rope},
               {"sinks", false, {kF32}, 1, 1, kDocument}},
              {query, key, value, s.indices, s.layout.blocks, s.layout.query_lengths, s.layout.key_lengths, query_rope,
               key_rope, s.sinks});
  check_common(s, query, key, value, 128, before, after, attention_mode);
  check_width(query, "query", kWidth, "a head of 512");
  check_width(key, "key", kWidth, "a head of 512");
  check_like(query_rope, "query_rope", query, kRope);
  check_like(key_rope, "key_rope", key, kRope);
  for (const auto& [x, name] : {std::pair(key, "key"), {query_rope, "query_rope"}, {key_rope, "key_rope"}})
    require(x.scalar_type() == query.scalar_type(), name, show(x), "the dtype of query");
  check_plain(query_rope, "query_rope");
  check_cache(s.layout, key_rope, "key_rope");
  require(!lse || !paged(s.layout), "return_softmax_lse", "true", "false, as layout_kv is PA_BSND");
  if (!s.sinks.defined()) return;
  require(on_a5(), "sinks", show(s.sinks), "nothing: only A5 has sinks");
  require(s.sinks.numel() == query.size(-2), "sinks", show(s.sinks), "a value for each head of query");
}

// hicann/ops-transformer attention/kv_quant_sparse_flash_attention/README.md: rows of K are 512 quantised values, 64
// values of query's dtype, and 4 fp32 scales.
constexpr int64_t kPackedWidth = kWidth + 2 * kRope + 4 * (kWidth / kTile);

struct Quantisation {
  int64_t key_mode, value_mode, place, tile, rope;
};

void check_quantised(const Attention& s, In query, In key, In value, In key_scale, In value_scale,
                     const Quantisation& mode, int64_t before, int64_t after, int64_t attention_mode) {
  const Types quantised = on_a5() ? Types{at::kChar, at::kFloat8_e4m3fn} : Types{at::kChar};
  check_table({{"query", true, kHalves, 3, 4, kDocument},
               {"key", true, quantised, 3, 4, kDocument},
               {"value", true, quantised, 3, 4, kDocument},
               {"sparse_indices", true, kInt32, 3, 4, kDocument},
               {"block_table", false, kInt32, 2, 2, kDocument},
               {"actual_seq_lengths_query", false, kInt32, 1, 1, kDocument},
               {"actual_seq_lengths_kv", false, kInt32, 1, 1, kDocument}},
              {query, key, value, s.indices, s.layout.blocks, s.layout.query_lengths, s.layout.key_lengths});
  require(!key_scale.defined(), "key_dequant_scale", show(key_scale), "nothing (reserved)");
  require(!value_scale.defined(), "value_dequant_scale", show(value_scale), "nothing (reserved)");
  check_common(s, query, key, value, 16, before, after, attention_mode);
  const int64_t heads = query.size(-2);  // the list of the document; 48 only on A5
  require(power_of_two(heads) || heads == 48, "query", show(query), "1, 2, 4, 8, 16, 32, 48, 64 or 128 heads");
  check_width(query, "query", kWidth + kRope, "a head of 512 + 64");
  check_width(key, "key", kPackedWidth, "rows of 656 bytes");
  const auto only = [](int64_t found, int64_t value_, const char* name) {
    require(found == value_, name, std::to_string(found), std::to_string(value_).c_str());
  };
  only(mode.key_mode, 2, "key_quant_mode");
  only(mode.value_mode, 2, "value_quant_mode");
  only(mode.place, 1, "quant_scale_repo_mode");
  only(mode.tile, kTile, "tile_size");
  only(mode.rope, kRope, "rope_head_dim");
}

// Positions that one query attends to. As CANN's test script: it reads as many entries as there are visible blocks, up
// to the first -1, and leaves out what lies behind the diagonal. Ours: what the document forbids stops the kernel.
at::Tensor positions(const Attention& s, In entries, const Sequence& sequence, int64_t visible) {
  const auto* entry = entries.const_data_ptr<int>();
  const int64_t count = std::min(entries.numel(), (visible + s.block - 1) / s.block);
  std::vector<int64_t> result;
  bool ended = false;
  for (int64_t i = 0; i < entries.numel(); ++i) {
    const int64_t first = entry[i] * s.block;
    if (entry[i] < -1 || first >= sequence.keys)
      throw Fault(kKernelFault,
                  "sparse_indices names a block that is not in the sequence: " + std::to_string(entry[i]));
    if (ended && entry[i] >= 0) throw Fault(kKernelFault, "sparse_indices has a valid index behind an invalid one");
    ended |= entry[i] < 0;
    for (int64_t at = first; !ended && i < count && at < std::min(first + s.block, visible); ++at) result.push_back(at);
  }
  return at::tensor(result, at::kLong);
}

// Rows of K [keys, 512 + 64] in fp32; V is their first 512 columns.
using Keys = std::function<at::Tensor(const Sequence&)>;

// Our reading: a query without keys gives 0, and (as CANN's test script) 0 for the largest and the sum, or the sink and
// 1. So do padding rows of BSND, without the sink. Rows of TND behind the last sequence are not written.
void attend(const Attention& s, In query, In key, const Keys& keys, Out out, const Out* largest, const Out* sum) {
  const at::Tensor q = query.flatten(0, -3), entries = s.indices.flatten(0, -2), o = out->flatten(0, -3);
  const int64_t heads = query.size(-2);
  const at::Tensor sinks = s.sinks.defined() ? s.sinks.unsqueeze(-1) : s.sinks;
  out.touch();
  for (const Sequence& sequence : sequences(s.layout, query, key)) {
    const at::Tensor k = keys(sequence);
    for (int64_t i = 0; i < sequence.queries + sequence.padding; ++i) {
      const int64_t row = sequence.first_query + i;
      const bool real = i < sequence.queries;
      const int64_t visible = real ? sequence.visible(i, s.sparse_mode) : 0;
      at::Tensor result = at::zeros({heads, kWidth}), top = at::zeros({heads, 1}), total = at::zeros({heads, 1});
      const at::Tensor chosen =
          real ? k.index_select(0, positions(s, entries[row], sequence, visible)) : k.narrow(0, 0, 0);
      if (chosen.size(0)) {
        const at::Tensor logits = at::matmul(q[row].to(kF32), chosen.t()).mul(s.scale);
        top = at::amax(logits, {-1}, true);
        if (sinks.defined()) top = at::maximum(top, sinks);
        const at::Tensor p = at::exp(logits.sub(top));
        total = p.sum(-1, true);
        if (sinks.defined()) total = total.add(at::exp(sinks.sub(top)));
        result = at::matmul(p, chosen.narrow(1, 0, kWidth)).div(total);
      } else if (real && sinks.defined()) {
        top = sinks;
        total = at::exp(sinks.sub(sinks));
      }
      o[row].copy_(result);
      if (largest) (*largest)->view({-1, heads})[row].copy_(top.squeeze(-1));
      if (sum) (*sum)->view({-1, heads})[row].copy_(total.squeeze(-1));
    }
  }
}

// In MLA-absorb V is K: the device may read either, so data that differ are refused.
void expect_same(const Attention& s, In key, In value, const Sequence& sequence) {
  if (key.data_ptr() == value.data_ptr()) return;
  if (!at::equal(rows_of(s.layout, key, sequence).view(at::kByte), rows_of(s.layout, value, sequence).view(at::kByte)))
    throw Fault(kKernelFault, "value differs from key: attention_mode 2 wants the same data");
}

void sparse_attention(const Attention& s, In query, In key, In value, In query_rope, In key_rope, bool lse, Out out,
                      Out largest, Out sum) {
  const Keys keys = [&](const Sequence& sequence) {
    expect_same(s, key, value, sequence);
    return at::cat({rows_of(s.layout, key, sequence), rows_of(s.layout, key_rope, sequence)}, -1).to(kF32);
  };
  attend(s, at::cat({query, query_rope}, -1), key, keys, out, lse ? &largest : nullptr, lse ? &sum : nullptr);
}

void quantised_attention(const Attention& s, In query, In key, In value, Out out) {
  const Keys keys = [&](const Sequence& sequence) {
    expect_same(s, key, value, sequence);
    const at::Tensor packed = rows_of(s.layout, key, sequence);
    const at::Tensor bytes = packed.view(at::kByte);
    const auto part = [&](int64_t first, int64_t count, at::ScalarType dtype) {
      return bytes.narrow(1, first, count).contiguous().view(dtype);
    };
    const at::Tensor values = packed.narrow(1, 0, kWidth).to(kF32);
    const at::Tensor scale = part(kWidth + 2 * kRope, 4 * (kWidth / kTile), kF32).repeat_interleave(kTile, 1);
    return at::cat({values.mul(scale), part(kWidth, 2 * kRope, query.scalar_type()).to(kF32)}, -1);
  };
  attend(s, query, key, keys, out, nullptr, nullptr);
}

constexpr auto check_v1 = [](In query, In key, In value, In indices, In blocks, In query_lengths, In key_lengths,
                             In query_rope, In key_rope, double scale, int64_t block, Text layout_query, Text layout_kv,
                             int64_t mode, int64_t before, int64_t after, int64_t attention_mode, bool lse, Out, Out,
                             Out) {
  check_attention(
      attention(query_lengths, key_lengths, blocks, layout_query, layout_kv, scale, block, mode, indices, {}), query,
      key, value, query_rope, key_rope, before, after, attention_mode, lse);
};
constexpr auto check_v2 = [](In query, In key, In value, In indices, In blocks, In query_lengths, In key_lengths,
                             In query_rope, In key_rope, In sinks, double scale, int64_t block, Text layout_query,
                             Text layout_kv, int64_t mode, int64_t before, int64_t after, int64_t attention_mode,
                             bool lse, Out, Out, Out) {
  check_attention(
      attention(query_lengths, key_lengths, blocks, layout_query, layout_kv, scale, block, mode, indices, sinks), query,
      key, value, query_rope, key_rope, before, after, attention_mode, lse);
};
constexpr auto check_kv_quant = [](In query, In key, In value, In indices, In key_scale, In value_scale, In blocks,
                                   In query_lengths, In key_lengths, double scale, int64_t key_mode, int64_t value_mode,
                                   int64_t block, Text layout_query, Text layout_kv, int64_t mode, int64_t before,
                                   int64_t after, int64_t attention_mode, int64_t place, int64_t tile, int64_t rope,
                                   Out) {
  check_quantised(
      attention(query_lengths, key_lengths, blocks, layout_query, layout_kv, scale, block, mode, indices, {}), query,
      key, value, key_scale, value_scale, {key_mode, value_mode, place, tile, rope}, before, after, attention_mode);
};

}  // namespace

CHECKED(aclnnSparseFlashAttention, check_v1,
        [](In query, In key, In value, In indices, In blocks, In query_lengths, In key_lengths, In query_rope,
           In key_rope, double scale, int64_t block, Text layout_query, Text layout_kv, int64_t mode, int64_t, int64_t,
           int64_t, bool lse, Out out, Out largest, Out sum) {
          sparse_attention(
              attention(query_lengths, key_lengths, blocks, layout_query, layout_kv, scale, block, mode, indices, {}),
              query, key, value, query_rope, key_rope, lse, out, largest, sum);
        })
CHECKED(aclnnSparseFlashAttentionV2, check_v2,
        [](In query, In key, In value, In indices, In blocks, In query_lengths, In key_lengths, In query_rope,
           In key_rope, In sinks, double scale, int64_t block, Text layout_query, Text layout_kv, int64_t mode, int64_t,
           int64_t, int64_t, bool lse, Out out, Out largest, Out sum) {
          sparse_attention(attention(query_lengths, key_lengths, blocks, layout_query, layout_kv, scale, block, mode,
                                     indices, sinks),
                           query, key, value, query_rope, key_rope, lse, out, largest, sum);
        })
CHECKED(aclnnKvQuantSparseFlashAttention, check_kv_quant,
        [](In query, In key, In value, In indices, In, In, In blocks, In query_lengths, In key_lengths, double scale,
           int64_t, int64_t, int64_t block, Text layout_query, Text layout_kv, int64_t mode, int64_t, int64_t, int64_t,
           int64_t, int64_t, int64_t, Out out) {
          quantised_attention(
              attention(query_lengths, key_lengths, blocks, layout_query, layout_kv, scale, block, mode, indices, {}),
              query, key, value, out);
        })

}  // namespace softnpu::sparse
