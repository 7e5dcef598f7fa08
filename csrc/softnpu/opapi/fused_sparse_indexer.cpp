// Lightning indexers: which keys each query attends to. Tables: argument, required, dtypes, ranks, source.
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sort.h>

#include "fused_sparse_layout.h"

namespace softnpu::sparse {
namespace {

const Types kInt32 = {at::kInt};

struct Indexer {
  Layout layout;
  int64_t count, sparse_mode;
};

Indexer indexer(In query_lengths, In key_lengths, In blocks, Text query, Text key, int64_t count, int64_t mode) {
  return {{query, key, query_lengths, key_lengths, blocks, "layout_key", "actual_seq_lengths_key"}, count, mode};
}

void check_heads(In query) {
  const int64_t heads = query.size(-2);
  if (on_a5())
    require(heads == 8 || heads == 16 || heads == 24 || heads == 32 || heads == 64, "query", show(query),
            "8, 16, 24, 32 or 64 heads");
  else
    require(heads <= 64, "query", show(query), "at most 64 heads");
}

void check_common(const Indexer& s, In query, In key, In weights, int64_t before, int64_t after) {
  check_layout(s.layout, query, key);
  check_heads(query);
  check_width(query, "query", 128, "a head of 128");
  check_width(key, "key", 128, "a head of 128");
  require(key.scalar_type() == query.scalar_type(), "key", show(key), "the dtype of query");
  require(weights.sizes() == query.sizes().slice(0, static_cast<size_t>(query.dim() - 1)), "weights", show(weights),
          "a value for each query and head");
  check_modes(s.sparse_mode, before, after);
  check_plain(query, "query");
  check_plain(weights, "weights");
  check_cache(s.layout, key, "key");
}

// hicann/ops-transformer attention/lightning_indexer/docs/aclnnLightningIndexer.md
constexpr auto check_indexer = [](In query, In key, In weights, In query_lengths, In key_lengths, In blocks,
                                  Text layout_query, Text layout_key, int64_t count, int64_t mode, int64_t before,
                                  int64_t after, bool values, Out, Out) {
  check_table({{"query", true, kHalves, 3, 4, kDocument},
               {"key", true, kHalves, 3, 4, kDocument},
               {"weights", true, on_a5() ? kHalves : Types{kF16, kBF16, kF32}, 2, 3, kDocument},
               {"actual_seq_lengths_query", false, kInt32, 1, 1, kDocument},
               {"actual_seq_lengths_key", false, kInt32, 1, 1, kDocument},
               {"block_table", false, kInt32, 2, 2, kDocument}},
              {query, key, weights, query_lengths, key_lengths, blocks});
  const Indexer s = indexer(query_lengths, key_lengths, blocks, layout_query, layout_key, count, mode);
  check_common(s, query, key, weights, before, after);
  require(weights.scalar_type() == kF32 || weights.scalar_type() == query.scalar_type(), "weights", show(weights),
          "the dtype of query (or, on A2 and A3, fp32)");
  require((count >= 1 && count <= 2048) || (count > 0 && count <= 8192 && count % 1024 == 0), "sparse_count",
          std::to_string(count), "1 to 2048, 3072, 4096, 5120, 6144, 7168 or 8192");
  require(!values || !paged(s.layout), "return_value", "true", "false, as layout_key is PA_BSND");
};

// hicann/ops-transformer attention/quant_lightning_indexer/docs/aclnnQuantLightningIndexer.md and README.md. They do
// not agree on A2 and A3 (the page's list of products, its limits for A3, the README's list): both taken, our reading.
constexpr auto check_quant_indexer = [](In query, In key, In weights, In query_scale, In key_scale, In query_lengths,
                                        In key_lengths, In blocks, int64_t query_quant, int64_t key_quant,
                                        Text layout_query, Text layout_key, int64_t count, int64_t mode, int64_t before,
                                        int64_t after, Out) {
  const Source source = on_a5() ? kDocument : kReading;
  const Types quantised = on_a5() ? Types{at::kChar, at::kFloat8_e4m3fn} : Types{at::kChar};
  const Types scales = on_a5() ? Types{kF16, kF32} : Types{kF16};
  check_table({{"query", true, quantised, 3, 4, source},
               {"key", true, quantised, 3, 4, source},
               {"weights", true, on_a5() ? kHalves : Types{kF16}, 2, 3, source},
               {"query_dequant_scale", true, scales, 2, 3, source},
               {"key_dequant_scale", true, scales, 2, 3, source},
               {"actual_seq_lengths_query", false, kInt32, 1, 1, kDocument},
               {"actual_seq_lengths_key", false, kInt32, 1, 1, kDocument},
               {"block_table", false, kInt32, 2, 2, kDocument}},
              {query, key, weights, query_scale, key_scale, query_lengths, key_lengths, blocks});
  const Indexer s = indexer(query_lengths, key_lengths, blocks, layout_query, layout_key, count, mode);
  check_common(s, query, key, weights, before, after);
  // weights, scales: fp16 with fp16; with FP8 also bf16 with fp32
  const auto expected = weights.scalar_type() == kF16 ? kF16 : kF32;
  require(weights.scalar_type() == kF16 || query.scalar_type() != at::kChar, "weights", show(weights),
          "fp16, as query is int8");
  require(query_scale.scalar_type() == expected, "query_dequant_scale", show(query_scale),
          "fp16 with fp16 weights, fp32 with bf16 weights");
  require(key_scale.scalar_type() == expected, "key_dequant_scale", show(key_scale),
          "the dtype of query_dequant_scale");
  require(query_scale.sizes() == weights.sizes(), "query_dequant_scale", show(query_scale), "the shape of weights");
  require(key_scale.sizes() == key.sizes().slice(0, static_cast<size_t>(key.dim() - 1)), "key_dequant_scale",
          show(key_scale), "a value for each key");
  require(count >= 1 && count <= 2048, "sparse_count", std::to_string(count), "1 to 2048");
  require(query_quant == 0, "query_quant_mode", std::to_string(query_quant), "0");
  require(key_quant == 0, "key_quant_mode", std::to_string(key_quant), "0");
  check_plain(query_scale, "query_dequant_scale");
  check_cache(s.layout, key_scale, "key_dequant_scale");
};

// For one query: sum over heads of w * relu(scale_q * scale_k * (q . k)), in fp32; undefined scales count as 1.
at::Tensor scores(In q, In k, In w, In query_scale, In key_scale) {
  at::Tensor dots = at::matmul(q, k.t());
  if (query_scale.defined()) dots = dots.mul(query_scale.unsqueeze(-1)).mul(key_scale);
  return at::matmul(w, at::relu(dots));
}

// The rows of x (all dimensions but the last `kept` flattened) in fp32; nothing for nothing.
at::Tensor rows(In x, int64_t kept) { return x.defined() ? x.flatten(0, -1 - kept).to(kF32) : x; }

// Our reading: best first, equal scores by position; behind them -1 (and -inf), also in the padding rows of BSND, as
// CANN's test script expects. Rows of TND behind the last sequence are not written.
void select(const Indexer& s, In query, In key, In weights, In query_scale, In key_scale, Out indices,
            const Out* values) {
  const at::Tensor q = rows(query, 2), w = rows(weights, 1), q_scale = rows(query_scale, 1);
  const at::Tensor chosen = indices->view({-1, s.count});
  const at::Tensor best = values ? (**values).view({-1, s.count}) : at::Tensor();
  indices.touch();
  for (const Sequence& sequence : sequences(s.layout, query, key)) {
    const at::Tensor k = rows_of(s.layout, key, sequence).to(kF32);
    const at::Tensor k_scale =
        key_scale.defined() ? rows_of(s.layout, key_scale, sequence).flatten().to(kF32) : key_scale;
    for (int64_t i = 0; i < sequence.queries + sequence.padding; ++i) {
      const int64_t row = sequence.first_query + i;
      chosen[row].fill_(-1);
      if (best.defined()) best[row].fill_(-std::numeric_limits<double>::infinity());
      const int64_t visible = i < sequence.queries ? sequence.visible(i, s.sparse_mode) : 0;
      if (visible == 0) continue;
      const at::Tensor score =
          scores(q[row], k.narrow(0, 0, visible), w[row], q_scale.defined() ? q_scale[row] : q_scale,
                 k_scale.defined() ? k_scale.narrow(0, 0, visible) : k_scale);
      const auto [value, position] = at::sort(score, std::optional(true), -1, true);
      const int64_t kept = std::min(visible, s.count);
      chosen[row].narrow(0, 0, kept).copy_(position.narrow(0, 0, kept));
      if (best.defined()) best[row].narrow(0, 0, kept).copy_(value.narrow(0, 0, kept));
    }
  }
}

}  // namespace

CHECKED(aclnnLightningIndexer, check_indexer,
        [](In query, In key, In weights, In query_lengths, In key_lengths, In blocks, Text layout_query,
           Text layout_key, int64_t count, int64_t mode, int64_t, int64_t, bool return_values, Out indices,
           Out values) {
          select(indexer(query_lengths, key_lengths, blocks, layout_query, layout_key, count, mode), query, key,
                 weights, at::Tensor(), at::Tensor(), indices, return_values ? &values : nullptr);
        })
CHECKED(aclnnQuantLightningIndexer, check_quant_indexer,
        [](In query, In key, In weights, In query_scale, In key_scale, In query_lengths, In key_lengths, In blocks,
           int64_t, int64_t, Text layout_query, Text layout_key, int64_t count, int64_t mode, int64_t, int64_t,
           Out indices) {
          const at::Tensor product = weights.to(kF32).mul(query_scale.to(kF32));
          if (product.abs().gt(65504).any().item<bool>())
            throw Fault(kKernelFault, "weights * query_dequant_scale is beyond fp16");
          select(indexer(query_lengths, key_lengths, blocks, layout_query, layout_key, count, mode), query, key,
                 weights, query_scale, key_scale, indices, nullptr);
        })

}  // namespace softnpu::sparse
