// Lightning indexers: which keys each query attends to. Tables: argument, its tensor, required,
// dtypes, ranks, source.
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sort.h>

#include "fused_sparse_layout.h"

namespace softnpu::sparse {
namespace {

struct Indexer {  // LightningIndexer, and the one with quantised keys
  at::Tensor query, key, weights, query_scale, key_scale, query_lengths, key_lengths, block_table;
  int64_t query_quant_mode, key_quant_mode;
  std::string layout_query, layout_key;
  int64_t count, sparse_mode, before, after;
  bool return_values;
  Out indices, values;
  FIELDS(plain, query, key, weights, query_lengths, key_lengths, block_table, layout_query,
         layout_key, count, sparse_mode, before, after, return_values, indices, values)
  FIELDS(quantised, query, key, weights, query_scale, key_scale, query_lengths, key_lengths,
         block_table, query_quant_mode, key_quant_mode, layout_query, layout_key, count,
         sparse_mode, before, after, indices)

  Layout layout() const {
    return {layout_query, layout_key,   query_lengths,           key_lengths,
            block_table,  "layout_key", "actual_seq_lengths_key"};
  }
  void check_common() const;
  void check() const;
  void check_quantised() const;
  void run() const;
  void run_quantised() const;
};

void check_heads(In query) {
  const int64_t heads = query.size(-2);
  if (on_a5())
    require(heads == 8 || heads == 16 || heads == 24 || heads == 32 || heads == 64, "query",
            show(query), "8, 16, 24, 32 or 64 heads");
  else
    require(heads <= 64, "query", show(query), "at most 64 heads");
}

void Indexer::check_common() const {
  check_layout(layout(), query, key);
  check_heads(query);
  check_width(query, "query", 128, "a head of 128");
  check_width(key, "key", 128, "a head of 128");
  require(key.scalar_type() == query.scalar_type(), "key", show(key), "the dtype of query");
  require(weights.sizes() == query.sizes().slice(0, static_cast<size_t>(query.dim() - 1)),
          "weights", show(weights), "a value for each query and head");
  check_modes(sparse_mode, before, after);
  check_plain(query, "query");
  check_plain(weights, "weights");
  check_cache(layout(), key, "key");
}

// hicann/ops-transformer attention/lightning_indexer/docs/aclnnLightningIndexer.md
void Indexer::check() const {
  check_table(
      {{"query", query, true, kHalves, 3, 4, kDocument},
       {"key", key, true, kHalves, 3, 4, kDocument},
       {"weights", weights, true, on_a5() ? kHalves : Types{kF16, kBF16, kF32}, 2, 3, kDocument},
       {"actual_seq_lengths_query", query_lengths, false, kInts, 1, 1, kDocument},
       {"actual_seq_lengths_key", key_lengths, false, kInts, 1, 1, kDocument},
       {"block_table", block_table, false, kInts, 2, 2, kDocument}});
  check_common();
  require(weights.scalar_type() == kF32 || weights.scalar_type() == query.scalar_type(), "weights",
          show(weights), "the dtype of query (or, on A2 and A3, fp32)");
  require((count >= 1 && count <= 2048) || (count > 0 && count <= 8192 && count % 1024 == 0),
          "sparse_count", std::to_string(count), "1 to 2048, 3072, 4096, 5120, 6144, 7168 or 8192");
  require(!return_values || !paged(layout()), "return_value", "true",
          "false, as layout_key is PA_BSND");
}

// hicann/ops-transformer attention/quant_lightning_indexer/docs/aclnnQuantLightningIndexer.md and
// README.md. They do not agree on A2 and A3 (the page's list of products, its limits for A3, the
// README's list): both taken, our reading.
void Indexer::check_quantised() const {
  const Source source = on_a5() ? kDocument : kReading;
  const Types types = on_a5() ? Types{at::kChar, at::kFloat8_e4m3fn} : Types{at::kChar};
  const Types scales = on_a5() ? Types{kF16, kF32} : Types{kF16};
  check_table({{"query", query, true, types, 3, 4, source},
               {"key", key, true, types, 3, 4, source},
               {"weights", weights, true, on_a5() ? kHalves : Types{kF16}, 2, 3, source},
               {"query_dequant_scale", query_scale, true, scales, 2, 3, source},
               {"key_dequant_scale", key_scale, true, scales, 2, 3, source},
               {"actual_seq_lengths_query", query_lengths, false, kInts, 1, 1, kDocument},
               {"actual_seq_lengths_key", key_lengths, false, kInts, 1, 1, kDocument},
               {"block_table", block_table, false, kInts, 2, 2, kDocument}});
  check_common();
  // weights, scales: fp16 with fp16; with FP8 also bf16 with fp32
  const auto expected = weights.scalar_type() == kF16 ? kF16 : kF32;
  require(weights.scalar_type() == kF16 || query.scalar_type() != at::kChar, "weights",
          show(weights), "fp16, as query is int8");
  require(query_scale.scalar_type() == expected, "query_dequant_scale", show(query_scale),
          "fp16 with fp16 weights, fp32 with bf16 weights");
  require(key_scale.scalar_type() == expected, "key_dequant_scale", show(key_scale),
          "the dtype of query_dequant_scale");
  require(query_scale.sizes() == weights.sizes(), "query_dequant_scale", show(query_scale),
          "the shape of weights");
  require(key_scale.sizes() == key.sizes().slice(0, static_cast<size_t>(key.dim() - 1)),
          "key_dequant_scale", show(key_scale), "a value for each key");
  require(count >= 1 && count <= 2048, "sparse_count", std::to_string(count), "1 to 2048");
  require(query_quant_mode == 0, "query_quant_mode", std::to_string(query_quant_mode), "0");
  require(key_quant_mode == 0, "key_quant_mode", std::to_string(key_quant_mode), "0");
  check_plain(query_scale, "query_dequant_scale");
  check_cache(layout(), key_scale, "key_dequant_scale");
}

// For one query: sum over heads of w * relu(scale_q * scale_k * (q . k)), in fp32; undefined scales
// count as 1.
at::Tensor scores(In q, In k, In w, In query_scale, In key_scale) {
  at::Tensor dots = at::matmul(q, k.t());
  if (query_scale.defined()) dots = dots.mul(query_scale.unsqueeze(-1)).mul(key_scale);
  return at::matmul(w, at::relu(dots));
}

// The rows of x (all dimensions but the last `kept` flattened) in fp32; nothing for nothing.
at::Tensor rows(In x, int64_t kept) { return x.defined() ? x.flatten(0, -1 - kept).to(kF32) : x; }

// Our reading: best first, equal scores by position; behind them -1 (and -inf), also in the padding
// rows of BSND, as CANN's test script expects. Rows of TND behind the last sequence are not
// written.
void Indexer::run() const {
  const at::Tensor q = rows(query, 2), w = rows(weights, 1), q_scale = rows(query_scale, 1);
  const at::Tensor chosen = indices->view({-1, count});
  const at::Tensor best = return_values ? values->view({-1, count}) : at::Tensor();
  indices.touch();
  for (const Sequence& sequence : sequences(layout(), query, key)) {
    const at::Tensor k = rows_of(layout(), key, sequence).to(kF32);
    const at::Tensor k_scale =
        key_scale.defined() ? rows_of(layout(), key_scale, sequence).flatten().to(kF32) : key_scale;
    for (int64_t i = 0; i < sequence.queries + sequence.padding; ++i) {
      const int64_t row = sequence.first_query + i;
      chosen[row].fill_(-1);
      if (best.defined()) best[row].fill_(-std::numeric_limits<double>::infinity());
      const int64_t visible = i < sequence.queries ? sequence.visible(i, sparse_mode) : 0;
      if (visible == 0) continue;
      const at::Tensor score = scores(q[row], k.narrow(0, 0, visible), w[row],
                                      q_scale.defined() ? q_scale[row] : q_scale,
                                      k_scale.defined() ? k_scale.narrow(0, 0, visible) : k_scale);
      const auto [value, position] = at::sort(score, std::optional(true), -1, true);
      const int64_t kept = std::min(visible, count);
      chosen[row].narrow(0, 0, kept).copy_(position.narrow(0, 0, kept));
      if (best.defined()) best[row].narrow(0, 0, kept).copy_(value.narrow(0, 0, kept));
    }
  }
}

void Indexer::run_quantised() const {
  const at::Tensor product = weights.to(kF32).mul(query_scale.to(kF32));
  if (product.abs().gt(65504).any().item<bool>())
    throw Fault(kKernelFault, "weights * query_dequant_scale is beyond fp16");
  run();
}

}  // namespace

NAMED(aclnnLightningIndexer, Indexer, plain, check, run)
NAMED(aclnnQuantLightningIndexer, Indexer, quantised, check_quantised, run_quantised)

}  // namespace softnpu::sparse
