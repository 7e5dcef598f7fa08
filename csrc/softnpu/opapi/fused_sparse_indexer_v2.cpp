// Lightning indexers of CANN 9.1's V4 family, with their metadata operators: keys are entries that
// stand for cmp_ratio tokens each. Tables: argument, its tensor, required, dtypes, ranks, source;
// docs/spec/ascend-operators.md 4.10 C and D, 10, 12.
#include <ATen/ops/index.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sort.h>

#include <limits>

#include "fused_metadata.h"

namespace softnpu::paged {
namespace {

constexpr int64_t kHeadWidth = 128;
enum Quantised : int64_t { kNotQuantised, kFp8, kInt8 };  // the page's quant_mode; 4 is HiFloat8

// What the metadata depends on, with the limits that both operators share.
struct Plan {
  const char* reader;
  at::Tensor cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cmp_residual_k;
  int64_t heads, topk, quant_mode, batch, queries, mask_mode, cmp_ratio;  // queries: -1 with TND
  std::string layout_q, layout_k;

  void check() const;
  Fingerprint fingerprint() const;
};

// Our reading: the list of ratios is the unquantised indexer's.
void Plan::check() const {
  const bool wide = !on_a5() && quant_mode == kNotQuantised;
  require(heads == 64 || (on_a5() && heads == 32), "num_heads_q", text(heads), "64; on A5 also 32");
  require((topk >= 1 && topk <= 2048) || (wide && topk > 0 && topk <= 8192 && topk % 1024 == 0),
          "topk", text(topk), "1 to 2048; on A2 and A3 with bf16 or fp16 keys 3072, ... 8192 too");
  require(quant_mode == kNotQuantised || quant_mode == (on_a5() ? kFp8 : kInt8), "quant_mode",
          text(quant_mode), "1 on A5 (4, HiFloat8, is not emulated), 2 on A2 and A3");
  require(mask_mode == 0 || mask_mode == 3, "mask_mode", text(mask_mode), "0 or 3");
  require(cmp_ratio == 1 || cmp_ratio == 4 || cmp_ratio == 128, "cmp_ratio", text(cmp_ratio),
          "1, 4 or 128");
  require(given(cmp_residual_k) || batch == 0 || cmp_ratio == 1 || mask_mode == 0, "cmp_residual_k",
          "nothing", "[B], as cmp_ratio is above 1 and mask_mode 3");
  require(!given(cmp_residual_k) || cmp_residual_k.numel() == batch, "cmp_residual_k",
          show(cmp_residual_k), "[B]");
  require(layout_q == "TND" || layout_q == "BSND", "layout_q", layout_q, "TND or BSND");
  const bool pages_only = !on_a5() && quant_mode != kNotQuantised;
  require(layout_k == "PA_BBND" || (layout_k == layout_q && !pages_only), "layout_k", layout_k,
          "PA_BBND, or layout_q (quantised keys: only on A5)");
}

Fingerprint Plan::fingerprint() const {
  Fingerprint result(reader);
  result.add_lengths("cu_seqlens_q", cu_seqlens_q);
  result.add_lengths("cu_seqlens_k", cu_seqlens_k);
  result.add_lengths("seqused_q", seqused_q);
  result.add_lengths("seqused_k", seqused_k);
  result.add_lengths("cmp_residual_k", cmp_residual_k);
  result.add("num_heads_q", heads);
  result.add("topk", topk);
  result.add("quant_mode", quant_mode);
  result.add("batch_size", batch);
  result.add("max_seqlen_q", queries);
  result.add("layout_q", layout_q);
  result.add("layout_k", layout_k);
  result.add("mask_mode", mask_mode);
  result.add("cmp_ratio", cmp_ratio);
  return result;
}

struct Metadata {
  at::Tensor cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cmp_residual_k;
  int64_t num_heads_q, num_heads_k, head_dim, topk, quant_mode, batch_size, max_seqlen_q,
      max_seqlen_k;
  std::string layout_q, layout_k;
  int64_t mask_mode, cmp_ratio;
  Out metadata;
  FIELDS(front, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cmp_residual_k, num_heads_q,
         num_heads_k, head_dim, topk)
  FIELDS(mode, quant_mode)
  FIELDS(back, batch_size, max_seqlen_q, max_seqlen_k, layout_q, layout_k, mask_mode, cmp_ratio,
         metadata)
  auto plain() { return front() + back(); }
  auto quantised() { return front() + mode() + back(); }

  Plan plan(const char* reader) const {
    return {reader,
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_q,
            seqused_k,
            cmp_residual_k,
            num_heads_q,
            topk,
            quant_mode,
            batch_size,
            layout_q == "TND" ? -1 : max_seqlen_q,
            mask_mode,
            cmp_ratio,
            layout_q,
            layout_k};
  }
  void check() const;
  void check_quantised() const;
  void run() const { plan("aclnnLightningIndexerV2").fingerprint().store(metadata); }
  void run_quantised() const { plan("aclnnQuantLightningIndexerV2").fingerprint().store(metadata); }
};

void Metadata::check() const {
  require_family();
  check_table({{"cu_seqlens_q", cu_seqlens_q, false, kLengths, 1, 1, kDocument},
               {"cu_seqlens_k", cu_seqlens_k, false, kLengths, 1, 1, kDocument},
               {"seqused_q", seqused_q, false, kLengths, 1, 1, kDocument},
               {"seqused_k", seqused_k, false, kLengths, 1, 1, kDocument},
               {"cmp_residual_k", cmp_residual_k, false, kLengths, 1, 1, kDocument},
               {"metadata", *metadata, true, kInts, 1, 1, kDocument}});
  require(num_heads_k == 1, "num_heads_k", text(num_heads_k), "1");
  require(head_dim == kHeadWidth, "head_dim", text(head_dim), "128");
  require(batch_size >= 0, "batch_size", text(batch_size), "0 or more");
  plan("").check();
  check_metadata(*metadata);
}

void Metadata::check_quantised() const {
  require_family();
  require(quant_mode != kNotQuantised, "quant_mode", "0", "1 on A5, 2 on A2 and A3");
  check();
}

struct Indexer {
  at::Tensor q, k, weights, q_descale, k_descale, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
      cmp_residual_k, block_table, output_idx_offset, metadata;
  int64_t topk, quant_mode, max_seqlen_q;
  std::string layout_q, layout_k;
  int64_t mask_mode, cmp_ratio, return_value;
  Out sparse_indices, sparse_values;
  FIELDS(inputs, q, k, weights)
  FIELDS(scales, q_descale, k_descale)
  FIELDS(lengths, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cmp_residual_k, block_table,
         output_idx_offset, metadata, topk)
  FIELDS(mode, quant_mode)
  FIELDS(rest, max_seqlen_q, layout_q, layout_k, mask_mode, cmp_ratio, return_value, sparse_indices,
         sparse_values)
  auto plain() { return inputs() + lengths() + rest(); }
  auto quantised() { return inputs() + scales() + lengths() + mode() + rest(); }

  Side queries() const {
    return {layout_q,       q,           cu_seqlens_q, seqused_q, {}, "q",
            "cu_seqlens_q", "seqused_q", "",           "layout_q"};
  }
  Side keys() const {
    return {layout_k,       k,           cu_seqlens_k,  seqused_k, block_table, "k",
            "cu_seqlens_k", "seqused_k", "block_table", "layout_k"};
  }
  Plan plan(const char* reader) const;
  void check_common(const Types& types, const Types& of_weights) const;
  void check() const;
  void check_quantised() const;
  at::Tensor scores(int64_t row, In keys, In key_scale) const;
  void store(int64_t row, In score) const;
  void select(const Plan& plan) const;
  void run() const { select(plan("aclnnLightningIndexerV2")); }
  void run_quantised() const;
};

Plan Indexer::plan(const char* reader) const {
  return {reader,
          cu_seqlens_q,
          cu_seqlens_k,
          seqused_q,
          seqused_k,
          cmp_residual_k,
          q.size(-2),
          topk,
          quant_mode,
          batch_size(queries()),
          layout_q == "TND" ? -1 : q.size(1),
          mask_mode,
          cmp_ratio,
          layout_q,
          layout_k};
}

void Indexer::check_common(const Types& types, const Types& of_weights) const {
  require_family();
  const Types values = quant_mode ? Types{kBF16} : Types{kF32};
  check_table({{"q", q, true, types, 3, 4, kDocument},
               {"k", k, true, types, 3, 4, kDocument},
               {"weights", weights, true, of_weights, 2, 3, kDocument},
               {"cu_seqlens_q", cu_seqlens_q, false, kLengths, 1, 1, kDocument},
               {"cu_seqlens_k", cu_seqlens_k, false, kLengths, 1, 1, kDocument},
               {"seqused_q", seqused_q, false, kLengths, 1, 1, kDocument},
               {"seqused_k", seqused_k, false, kLengths, 1, 1, kDocument},
               {"cmp_residual_k", cmp_residual_k, false, kLengths, 1, 1, kDocument},
               {"block_table", block_table, false, kInts, 2, 2, kDocument},
               {"metadata", metadata, false, kInts, 1, 1, kDocument},
               {"sparse_indices", *sparse_indices, true, kInts, 3, 4, kDocument},
               {"sparse_values", *sparse_values, true, values, 1, 4, kDocument}});
  require(!given(output_idx_offset), "output_idx_offset", show(output_idx_offset),
          "nothing (an offset is not emulated)");
  check_queries(queries(), true);
  const Plan plan = this->plan("");
  plan.check();
  check_keys(keys(), layout_q, plan.batch);
  for (const auto& [x, name] : {std::pair(q, "q"), {k, "k"}})
    require(x.size(-1) == kHeadWidth && x.scalar_type() == q.scalar_type(), name, show(x),
            "heads of 128, one dtype for q and k");
  require(weights.sizes() == q.sizes().slice(0, static_cast<size_t>(q.dim() - 1)), "weights",
          show(weights), "a value for each query and head");
  check_dense(weights, "weights");
  require(return_value == 0 || return_value == 1, "return_value", text(return_value), "0 or 1");
  require(max_seqlen_q >= -1, "max_seqlen_q", text(max_seqlen_q), "-1 or more");
  std::vector<int64_t> shape = q.sizes().vec();
  shape[shape.size() - 2] = 1;
  shape.back() = topk;
  require(sparse_indices->sizes() == at::IntArrayRef(shape), "sparse_indices",
          show(*sparse_indices), "the rows of q, one head, topk");
  require(return_value == 0 || sparse_values->sizes() == at::IntArrayRef(shape), "sparse_values",
          show(*sparse_values), "the shape of sparse_indices");
  if (given(metadata)) check_metadata(metadata);
}

void Indexer::check() const { check_common(kHalves, {kF32}); }

void Indexer::check_quantised() const {
  require_family();
  require(quant_mode != kNotQuantised, "quant_mode", "0", "1 on A5, 2 on A2 and A3");
  const Types scale = {on_a5() ? kF32 : kF16};
  check_common({on_a5() ? kE4M3 : kI8}, scale);
  check_table({{"q_descale", q_descale, true, scale, 2, 3, kDocument},
               {"k_descale", k_descale, true, scale, 2, 3, kDocument}});
  require(q_descale.sizes() == weights.sizes(), "q_descale", show(q_descale),
          "the shape of weights");
  require(k_descale.sizes() == k.sizes().slice(0, static_cast<size_t>(k.dim() - 1)), "k_descale",
          show(k_descale), "k without its last dimension");
  check_dense(q_descale, "q_descale");
  check_pages(k_descale, "k_descale");
  require(on_a5() || return_value == 0, "return_value", text(return_value), "0 on A2 and A3");
}

// For one query: sum over heads of w * relu(scale_q * scale_k * (q . k)), in fp32. Quantised on A5
// they are rounded to bf16.
at::Tensor Indexer::scores(int64_t row, In keys, In key_scale) const {
  at::Tensor dots = at::matmul(q.flatten(0, -3)[row].to(kF32), keys.t());
  if (quant_mode)
    dots = dots.mul(q_descale.flatten(0, -2)[row].to(kF32).unsqueeze(-1)).mul(key_scale);
  const at::Tensor result = at::matmul(weights.flatten(0, -2)[row].to(kF32), at::relu(dots));
  if (at::isnan(result).any().item<bool>())
    fault("q", "a score of query " + text(row) + " is NaN, what is selected then is undefined");
  return quant_mode && on_a5() ? result.to(kBF16).to(kF32) : result;
}

// No document says which of equal scores is taken: here the last ones, so that nobody relies on the
// first. Nor in which order A5 lists them (it selects by histogram): here from the last to the
// first.
void Indexer::store(int64_t row, In score) const {
  const int64_t visible = score.size(0), kept = std::min(visible, topk);
  const at::Tensor chosen = sparse_indices->view({-1, topk})[row];
  chosen.fill_(-1);
  at::Tensor place =
      std::get<1>(at::sort(score.flip(0), std::optional(true), -1, true)).narrow(0, 0, kept);
  place = place.mul(-1).add(visible - 1);
  if (on_a5()) place = std::get<0>(at::sort(place, -1, true));
  chosen.narrow(0, 0, kept).copy_(place);
  if (!return_value) return;
  const at::Tensor best = sparse_values->view({-1, topk})[row];
  best.fill_(-std::numeric_limits<double>::infinity());
  best.narrow(0, 0, kept).copy_(score.index_select(0, place));
}

// Queries of TND behind the last sequence are not written; those of BSND behind seqused_q get -1.
void Indexer::select(const Plan& plan) const {
  if (given(metadata)) plan.fingerprint().expect(metadata);
  sparse_indices.touch();
  const auto rows = spans(queries(), plan.batch);
  const Keys held(keys(), plan.batch);
  const auto residual = values_of(cmp_residual_k);
  for (int64_t b = 0; b < plan.batch; ++b) {
    const Span& span = rows[static_cast<size_t>(b)];
    const int64_t count = held.count(b);
    const int64_t rest = residual.empty() ? 0 : residual[static_cast<size_t>(b)];
    if (rest < 0 || rest >= cmp_ratio)
      fault("cmp_residual_k",
            "found " + text(rest) + " of sequence " + text(b) + ", expected 0 to cmp_ratio - 1");
    const int64_t tokens = count * cmp_ratio + rest;
    if (max_seqlen_q >= 0 && span.count > max_seqlen_q)
      fault("max_seqlen_q", text(max_seqlen_q) + " is less than the length " + text(span.count));
    if (mask_mode == 3 && tokens < span.count)
      fault("seqused_k", text(tokens) + " tokens of sequence " + text(b) + " with " +
                             text(span.count) + " queries");
    const Places where = held.places(b, range(0, count));
    const at::Tensor keys = at::index(held.pool.squeeze(2), {where.pages, where.rows}).to(kF32);
    at::Tensor scale;
    if (quant_mode) {
      const at::Tensor pool = layout_k == "TND" ? k_descale.unsqueeze(0) : k_descale;
      scale = at::index(pool.squeeze(2), {where.pages, where.rows}).to(kF32);
    }
    for (int64_t i = 0; i < span.count + span.padding; ++i) {
      int64_t visible = mask_mode == 0 ? count : (tokens - span.count + i + 1) / cmp_ratio;
      visible = i < span.count ? std::min(visible, count) : 0;
      store(span.first + i, visible ? scores(span.first + i, keys.narrow(0, 0, visible),
                                             scale.defined() ? scale.narrow(0, 0, visible) : scale)
                                    : keys.flatten().narrow(0, 0, 0));
    }
  }
}

void Indexer::run_quantised() const {
  const at::Tensor product = weights.to(kF32).mul(q_descale.to(kF32));
  if (!on_a5() && product.abs().gt(65504).any().item<bool>())
    fault("weights", "weights * q_descale is beyond fp16");
  select(plan("aclnnQuantLightningIndexerV2"));
}

}  // namespace

NAMED(aclnnLightningIndexerV2, Indexer, plain, check, run)
NAMED(aclnnLightningIndexerV2Metadata, Metadata, plain, check, run)
NAMED(aclnnQuantLightningIndexerV2, Indexer, quantised, check_quantised, run_quantised)
NAMED(aclnnQuantLightningIndexerV2Metadata, Metadata, quantised, check_quantised, run_quantised)

}  // namespace softnpu::paged
