// Attention over chosen keys. Tables: argument, its tensor, required, dtypes, ranks, source.
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

constexpr int64_t kWidth = 512, kRope = 64,
                  kTile = 128;  // of a head, of its rotated part, of one dequantisation scale

struct Attention {  // SparseFlashAttention, its V2, and the one with quantised keys
  at::Tensor query, key, value, sparse_indices, key_dequant_scale, value_dequant_scale, block_table,
      query_lengths, key_lengths, query_rope, key_rope, sinks;
  double scale;
  int64_t key_quant_mode, value_quant_mode, block, sparse_mode, before, after, attention_mode,
      quant_scale_repo_mode, tile_size, rope_head_dim;
  std::string layout_query, layout_kv;
  bool lse;
  Out out, largest, sum;
  FIELDS(v1, query, key, value, sparse_indices, block_table, query_lengths, key_lengths, query_rope,
         key_rope, scale, block, layout_query, layout_kv, sparse_mode, before, after,
         attention_mode, lse, out, largest, sum)
  FIELDS(v2, query, key, value, sparse_indices, block_table, query_lengths, key_lengths, query_rope,
         key_rope, sinks, scale, block, layout_query, layout_kv, sparse_mode, before, after,
         attention_mode, lse, out, largest, sum)
  FIELDS(quantised, query, key, value, sparse_indices, key_dequant_scale, value_dequant_scale,
         block_table, query_lengths, key_lengths, scale, key_quant_mode, value_quant_mode, block,
         layout_query, layout_kv, sparse_mode, before, after, attention_mode, quant_scale_repo_mode,
         tile_size, rope_head_dim, out)

  Layout layout() const {
    return {layout_query, layout_kv,   query_lengths,          key_lengths,
            block_table,  "layout_kv", "actual_seq_lengths_kv"};
  }
  void check_common(int64_t largest_block) const;
  void check() const;
  void check_quantised() const;
  void run() const;
  void run_quantised() const;
};

bool power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

void check_like(In x, const char* name, In other, int64_t width) {
  std::vector<int64_t> expected = other.sizes().vec();
  expected.back() = width;
  require(x.sizes() == at::IntArrayRef(expected), name, show(x),
          "the other dimensions of query (of key), 64 wide");
}

// What both attentions limit: heads, indices, block of indices, modes; V is K (MLA-absorb).
void Attention::check_common(int64_t largest_block) const {
  const Layout layout = this->layout();
  check_layout(layout, query, key);
  const int64_t heads = query.size(-2);
  require(heads <= 128 && (on_a5() || power_of_two(heads)), "query", show(query),
          "up to 128 heads, a power of two on A2 and A3");
  std::vector<int64_t> rows = query.sizes().vec();
  rows[rows.size() - 2] = 1;
  rows.back() = sparse_indices.size(-1);
  require(sparse_indices.sizes() == at::IntArrayRef(rows) && rows.back() > 0, "sparse_indices",
          show(sparse_indices), "query's rows, one head, and at least one index");
  std::vector<int64_t> parts = key.sizes().vec();
  if (key_dequant_scale.defined() || parts.back() == 656) parts.back() = 512;  // its values alone
  const bool fits = value.sizes() == key.sizes() || value.sizes() == at::IntArrayRef(parts);
  require(fits && value.scalar_type() == key.scalar_type(), "value", show(value),
          "shape and dtype of key (of quantised keys of 656 bytes also their first 512)");
  require(power_of_two(block) && block <= (on_a5() ? 1 : largest_block), "sparse_block_size",
          std::to_string(block),
          "1; on A2 and A3 a power of two, up to 128 (16 with quantised keys)");
  require(!paged(layout) || key.size(1) % block == 0, "sparse_block_size", std::to_string(block),
          "a divisor of the block size");
  require(attention_mode == 2, "attention_mode", std::to_string(attention_mode), "2 (MLA-absorb)");
  check_modes(sparse_mode, before, after);
  check_plain(query, "query");
  check_plain(sparse_indices, "sparse_indices");
  check_cache(layout, key, "key");
  check_cache(layout, value, "value");
}

// hicann/ops-transformer attention/sparse_flash_attention/docs/aclnnSparseFlashAttention.md and
// ...V2.md (sinks); torchapi_sparse_flash_attention.md says what mode 2 needs (both rope parts, V
// the same data as K) and allows gaps between pages on A5. Our reading: A2 and A3 need the rope
// parts too; sinks with pages are allowed (no document says otherwise, CANN's test script leaves
// them out).
void Attention::check() const {
  const Source rope = on_a5() ? kDocument : kReading;
  require(value.defined(), "value", "nothing",
          "a tensor (None, possible from CANN 9.2 on, is not emulated)");
  check_table({{"query", query, true, kHalves, 3, 4, kDocument},
               {"key", key, true, kHalves, 3, 4, kDocument},
               {"value", value, true, kHalves, 3, 4, kDocument},
               {"sparse_indices", sparse_indices, true, kInts, 3, 4, kDocument},
               {"block_table", block_table, false, kInts, 2, 2, kDocument},
               {"actual_seq_lengths_query", query_lengths, false, kInts, 1, 1, kDocument},
               {"actual_seq_lengths_kv", key_lengths, false, kInts, 1, 1, kDocument},
               {"query_rope", query_rope, true, kHalves, 3, 4, rope},
               {"key_rope", key_rope, true, kHalves, 3, 4, rope},
               {"sinks", sinks, false, {kF32}, 1, 1, kDocument}});
  check_common(128);
  check_width(query, "query", kWidth, "a head of 512");
  check_width(key, "key", kWidth, "a head of 512");
  check_like(query_rope, "query_rope", query, kRope);
  check_like(key_rope, "key_rope", key, kRope);
  for (const auto& [x, name] :
       {std::pair(key, "key"), {query_rope, "query_rope"}, {key_rope, "key_rope"}})
    require(x.scalar_type() == query.scalar_type(), name, show(x), "the dtype of query");
  check_plain(query_rope, "query_rope");
  check_cache(layout(), key_rope, "key_rope");
  require(!lse || !paged(layout()), "return_softmax_lse", "true", "false, as layout_kv is PA_BSND");
  if (!sinks.defined()) return;
  require(on_a5(), "sinks", show(sinks), "nothing: only A5 has sinks");
  require(sinks.numel() == query.size(-2), "sinks", show(sinks), "a value for each head of query");
}

// hicann/ops-transformer attention/kv_quant_sparse_flash_attention/README.md: rows of K are 512
// quantised values, 64 values of query's dtype, and 4 fp32 scales.
constexpr int64_t kPackedWidth = kWidth + 2 * kRope + 4 * (kWidth / kTile);

void Attention::check_quantised() const {
  const Types types = on_a5() ? Types{at::kChar, at::kFloat8_e4m3fn} : Types{at::kChar};
  check_table({{"query", query, true, kHalves, 3, 4, kDocument},
               {"key", key, true, types, 3, 4, kDocument},
               {"value", value, true, types, 3, 4, kDocument},
               {"sparse_indices", sparse_indices, true, kInts, 3, 4, kDocument},
               {"block_table", block_table, false, kInts, 2, 2, kDocument},
               {"actual_seq_lengths_query", query_lengths, false, kInts, 1, 1, kDocument},
               {"actual_seq_lengths_kv", key_lengths, false, kInts, 1, 1, kDocument}});
  require(!key_dequant_scale.defined(), "key_dequant_scale", show(key_dequant_scale),
          "nothing (reserved)");
  require(!value_dequant_scale.defined(), "value_dequant_scale", show(value_dequant_scale),
          "nothing (reserved)");
  check_common(16);
  const int64_t heads = query.size(-2);  // the list of the document; 48 only on A5
  require(power_of_two(heads) || heads == 48, "query", show(query),
          "1, 2, 4, 8, 16, 32, 48, 64 or 128 heads");
  check_width(query, "query", kWidth + kRope, "a head of 512 + 64");
  check_width(key, "key", kPackedWidth, "rows of 656 bytes");
  const auto only = [](int64_t found, int64_t only_one, const char* name) {
    require(found == only_one, name, std::to_string(found), std::to_string(only_one).c_str());
  };
  only(key_quant_mode, 2, "key_quant_mode");
  only(value_quant_mode, 2, "value_quant_mode");
  only(quant_scale_repo_mode, 1, "quant_scale_repo_mode");
  only(tile_size, kTile, "tile_size");
  only(rope_head_dim, kRope, "rope_head_dim");
}

// Positions that one query attends to. As CANN's test script: it reads as many entries as there are
// visible blocks, up to the first -1, and leaves out what lies behind the diagonal. Ours: what the
// document forbids stops the kernel.
at::Tensor positions(In entries, int64_t block, const Sequence& sequence, int64_t visible) {
  const auto* entry = entries.const_data_ptr<int>();
  const int64_t count = std::min(entries.numel(), (visible + block - 1) / block);
  std::vector<int64_t> result;
  bool ended = false;
  for (int64_t i = 0; i < entries.numel(); ++i) {
    const int64_t first = entry[i] * block;
    if (entry[i] < -1 || first >= sequence.keys)
      throw Fault(kKernelFault, "sparse_indices names a block that is not in the sequence: " +
                                    std::to_string(entry[i]));
    if (ended && entry[i] >= 0)
      throw Fault(kKernelFault, "sparse_indices has a valid index behind an invalid one");
    ended |= entry[i] < 0;
    for (int64_t at = first; !ended && i < count && at < std::min(first + block, visible); ++at)
      result.push_back(at);
  }
  return at::tensor(result, at::kLong);
}

// Rows of K [keys, 512 + 64] in fp32; V is their first 512 columns.
using Keys = std::function<at::Tensor(const Sequence&)>;

// Our reading: a query without keys gives 0, and (as CANN's test script) 0 for the largest and the
// sum, or the sink and
// 1. So do padding rows of BSND, without the sink. Rows of TND behind the last sequence are not
// written.
void attend(const Attention& call, In query, const Keys& keys) {
  const at::Tensor q = query.flatten(0, -3), entries = call.sparse_indices.flatten(0, -2),
                   o = call.out->flatten(0, -3);
  const int64_t heads = query.size(-2);
  const at::Tensor sinks = call.sinks.defined() ? call.sinks.unsqueeze(-1) : call.sinks;
  call.out.touch();
  for (const Sequence& sequence : sequences(call.layout(), query, call.key)) {
    const at::Tensor k = keys(sequence);
    for (int64_t i = 0; i < sequence.queries + sequence.padding; ++i) {
      const int64_t row = sequence.first_query + i;
      const bool real = i < sequence.queries;
      const int64_t visible = real ? sequence.visible(i, call.sparse_mode) : 0;
      at::Tensor result = at::zeros({heads, kWidth}), top = at::zeros({heads, 1}),
                 total = at::zeros({heads, 1});
      const at::Tensor chosen =
          real ? k.index_select(0, positions(entries[row], call.block, sequence, visible))
               : k.narrow(0, 0, 0);
      if (chosen.size(0)) {
        const at::Tensor logits = at::matmul(q[row].to(kF32), chosen.t()).mul(call.scale);
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
      if (!call.lse) continue;
      call.largest->view({-1, heads})[row].copy_(top.squeeze(-1));
      call.sum->view({-1, heads})[row].copy_(total.squeeze(-1));
    }
  }
}

// In MLA-absorb V is K: the device may read either, so data that differ are refused.
void expect_same(const Attention& call, const Sequence& sequence) {
  if (call.key.data_ptr() == call.value.data_ptr()) return;
  const auto bytes = [&](In cache) {
    return rows_of(call.layout(), cache, sequence).view(at::kByte);
  };
  const int64_t width = call.value.size(-1);  // of quantised keys perhaps their values alone
  if (!at::equal(bytes(call.key.narrow(-1, 0, width)), bytes(call.value)))
    throw Fault(kKernelFault, "value differs from key: attention_mode 2 wants the same data");
}

void Attention::run() const {
  const Keys keys = [this](const Sequence& sequence) {
    expect_same(*this, sequence);
    return at::cat({rows_of(layout(), key, sequence), rows_of(layout(), key_rope, sequence)}, -1)
        .to(kF32);
  };
  attend(*this, at::cat({query, query_rope}, -1), keys);
}

void Attention::run_quantised() const {
  const Keys keys = [this](const Sequence& sequence) {
    expect_same(*this, sequence);
    const at::Tensor packed = rows_of(layout(), key, sequence);
    const at::Tensor bytes = packed.view(at::kByte);
    const auto part = [&](int64_t first, int64_t count, at::ScalarType dtype) {
      return bytes.narrow(1, first, count).contiguous().view(dtype);
    };
    const at::Tensor values = packed.narrow(1, 0, kWidth).to(kF32);
    const at::Tensor scales =
        part(kWidth + 2 * kRope, 4 * (kWidth / kTile), kF32).repeat_interleave(kTile, 1);
    return at::cat({values.mul(scales), part(kWidth, 2 * kRope, query.scalar_type()).to(kF32)}, -1);
  };
  attend(*this, query, keys);
}

}  // namespace

NAMED(aclnnSparseFlashAttention, Attention, v1, check, run)
NAMED(aclnnSparseFlashAttentionV2, Attention, v2, check, run)
NAMED(aclnnKvQuantSparseFlashAttention, Attention, quantised, check_quantised, run_quantised)

}  // namespace softnpu::sparse
