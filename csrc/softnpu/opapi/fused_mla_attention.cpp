// SparseFlashMla and MixedQuantSparseFlashMla with their metadata operators: checks and kernels.
// Tables: argument, its tensor, required, dtypes, ranks, source; docs/spec/ascend-operators.md
// 4.11 D and E, 10.
#include <ATen/ops/index.h>

#include "fused_mla.h"

namespace softnpu::mla {
namespace {

using paged::given;

struct Metadata {
  at::Tensor cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_ori_kv,
      seqused_cmp_kv, cmp_residual_kv, ori_topk_length, cmp_topk_length;
  int64_t num_heads_q, num_heads_kv, head_dim, batch_size, max_seqlen_q, max_seqlen_ori_kv,
      max_seqlen_cmp_kv, ori_topk, cmp_topk, cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left,
      ori_win_right, quant_mode, rope_head_dim;
  std::string layout_q, layout_kv;
  bool has_ori_kv, has_cmp_kv;
  Out metadata;
  FIELDS(lengths, cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_ori_kv,
         seqused_cmp_kv, cmp_residual_kv, ori_topk_length, cmp_topk_length, num_heads_q,
         num_heads_kv, head_dim)
  FIELDS(sizes, batch_size, max_seqlen_q, max_seqlen_ori_kv, max_seqlen_cmp_kv, ori_topk, cmp_topk)
  FIELDS(rest, cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right, layout_q,
         layout_kv, has_ori_kv, has_cmp_kv, metadata)
  FIELDS(mode, quant_mode)
  FIELDS(rope, rope_head_dim)
  auto plain() { return lengths() + sizes() + rest(); }
  auto mixed() { return lengths() + mode() + sizes() + rope() + rest(); }

  Plan plan(const char* reader, int64_t mode) const {
    return {reader,
            cu_seqlens_q,
            cu_seqlens_ori_kv,
            cu_seqlens_cmp_kv,
            seqused_q,
            seqused_ori_kv,
            seqused_cmp_kv,
            cmp_residual_kv,
            num_heads_q,
            batch_size,
            layout_q == "TND" ? -1 : max_seqlen_q,
            cmp_topk,
            cmp_ratio,
            ori_mask_mode,
            cmp_mask_mode,
            ori_win_left,
            ori_win_right,
            mode,
            layout_q,
            layout_kv,
            has_cmp_kv};
  }
  void check_common(const Plan& plan) const;
  void check() const;
  void check_mixed() const;
  void check_maximum(const std::vector<int64_t>& counts, int64_t maximum, const char* name) const;
  void store(const Plan& plan) const;
  void run() const { store(plan("aclnnSparseFlashMla", 0)); }
  void run_mixed() const { store(plan("aclnnMixedQuantSparseFlashMla", quant_mode)); }
};

void Metadata::check_common(const Plan& plan) const {
  const Types& ints = paged::kLengths;
  check_table({{"cu_seqlens_q", cu_seqlens_q, false, ints, 1, 1, kDocument},
               {"cu_seqlens_ori_kv", cu_seqlens_ori_kv, false, ints, 1, 1, kDocument},
               {"cu_seqlens_cmp_kv", cu_seqlens_cmp_kv, false, ints, 1, 1, kDocument},
               {"seqused_q", seqused_q, false, ints, 1, 1, kDocument},
               {"seqused_ori_kv", seqused_ori_kv, false, ints, 1, 1, kDocument},
               {"seqused_cmp_kv", seqused_cmp_kv, false, ints, 1, 1, kDocument},
               {"cmp_residual_kv", cmp_residual_kv, false, ints, 1, 1, kDocument},
               {"metadata", *metadata, true, kInts, 1, 1, kDocument}});
  for (const auto& [x, name] : {std::pair(seqused_q, "seqused_q"),
                                {ori_topk_length, "ori_topk_length"},
                                {cmp_topk_length, "cmp_topk_length"}})
    require(!given(x), name, show(x), "nothing");
  require(num_heads_kv == 1, "num_heads_kv", text(num_heads_kv), "1");
  require(head_dim == kWidth, "head_dim", text(head_dim), "512");
  require(batch_size >= 0, "batch_size", text(batch_size), "0 or more");
  require(max_seqlen_q >= 0, "max_seqlen_q", text(max_seqlen_q), "0 or more");
  require(ori_topk == 0, "ori_topk", text(ori_topk), "0");
  require(cmp_topk == 0 || cmp_topk == 512 || cmp_topk == 1024, "cmp_topk", text(cmp_topk),
          "0, 512 or 1024");
  require(has_ori_kv, "has_ori_kv", "false", "true");
  require(!given(cu_seqlens_q) || cu_seqlens_q.numel() == batch_size + 1, "cu_seqlens_q",
          show(cu_seqlens_q), "[batch_size + 1]");
  for (const auto& [x, name] : {std::pair(seqused_ori_kv, "seqused_ori_kv"),
                                {seqused_cmp_kv, "seqused_cmp_kv"},
                                {cmp_residual_kv, "cmp_residual_kv"}})
    require(!given(x) || x.numel() == batch_size, name, show(x), "[batch_size]");
  plan.check();
  paged::check_metadata(*metadata);
}

void Metadata::check() const {
  require_family();
  check_common(plan("aclnnSparseFlashMla", 0));
}

void Metadata::check_mixed() const {
  require_family(kOnA5);
  require(quant_mode == 1 || quant_mode == 2, "quant_mode", text(quant_mode), "1 or 2");
  require(rope_head_dim == kRope, "rope_head_dim", text(rope_head_dim), "64");
  check_common(plan("aclnnMixedQuantSparseFlashMla", quant_mode));
}

// Our reading: a maximum below a length would split the work wrongly.
void Metadata::check_maximum(const std::vector<int64_t>& counts, int64_t maximum,
                             const char* name) const {
  for (const int64_t count : counts)
    if (count > maximum)
      paged::fault(name, text(maximum) + " is less than the length " + text(count));
}

void Metadata::store(const Plan& plan) const {
  auto queries = paged::values_of(cu_seqlens_q);
  for (size_t i = queries.size(); i-- > 1;) queries[i] -= queries[i - 1];
  check_maximum(queries, max_seqlen_q, "max_seqlen_q");
  check_maximum(paged::values_of(seqused_ori_kv), max_seqlen_ori_kv, "max_seqlen_ori_kv");
  check_maximum(paged::values_of(seqused_cmp_kv), max_seqlen_cmp_kv, "max_seqlen_cmp_kv");
  plan.fingerprint().store(metadata);
}

struct Attention {
  at::Tensor q, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table,
      cmp_block_table, cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q,
      seqused_ori_kv, seqused_cmp_kv, cmp_residual_kv, ori_topk_length, cmp_topk_length, sinks,
      metadata;
  int64_t quant_mode, rope_head_dim;
  double softmax_scale;
  int64_t cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right;
  std::string layout_q, layout_kv;
  int64_t topk_value_mode;
  bool return_softmax_lse;
  Out attention_out;
  OptionalOut softmax_lse;
  FIELDS(tensors, q, ori_kv, cmp_kv, ori_sparse_indices, cmp_sparse_indices, ori_block_table,
         cmp_block_table, cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q,
         seqused_ori_kv, seqused_cmp_kv, cmp_residual_kv, ori_topk_length, cmp_topk_length, sinks,
         metadata)
  FIELDS(modes, quant_mode, rope_head_dim)
  FIELDS(rest, softmax_scale, cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right,
         layout_q, layout_kv, topk_value_mode, return_softmax_lse, attention_out, softmax_lse)
  auto plain() { return tensors() + rest(); }
  auto mixed() { return tensors() + modes() + rest(); }

  bool has_cmp() const { return given(cmp_kv); }
  bool chooses() const { return given(cmp_sparse_indices); }
  paged::Side queries() const {
    return {layout_q,       q,           cu_seqlens_q, seqused_q, {}, "q",
            "cu_seqlens_q", "seqused_q", "",           "layout_q"};
  }
  paged::Side original() const {
    return {layout_kv,         ori_kv,     cu_seqlens_ori_kv,   seqused_ori_kv,
            ori_block_table,   "ori_kv",   "cu_seqlens_ori_kv", "seqused_ori_kv",
            "ori_block_table", "layout_kv"};
  }
  paged::Side compressed() const {
    return {layout_kv,         cmp_kv,     cu_seqlens_cmp_kv,   seqused_cmp_kv,
            cmp_block_table,   "cmp_kv",   "cu_seqlens_cmp_kv", "seqused_cmp_kv",
            "cmp_block_table", "layout_kv"};
  }
  Plan plan(const char* reader, int64_t mode) const;
  void check_keys(const paged::Side& side, int64_t batch, int64_t mode) const;
  void check_common(const Types& queries, const Types& keys, int64_t mode) const;
  void check() const;
  void check_mixed() const;
  std::vector<int64_t> entries(In row, int64_t visible) const;
  void attend(const Plan& plan) const;
  void run() const { attend(plan("aclnnSparseFlashMla", 0)); }
  void run_mixed() const { attend(plan("aclnnMixedQuantSparseFlashMla", quant_mode)); }
};

Plan Attention::plan(const char* reader, int64_t mode) const {
  return {reader,
          cu_seqlens_q,
          cu_seqlens_ori_kv,
          cu_seqlens_cmp_kv,
          seqused_q,
          seqused_ori_kv,
          seqused_cmp_kv,
          cmp_residual_kv,
          q.size(-2),
          paged::batch_size(queries()),
          layout_q == "TND" ? -1 : q.size(1),
          chooses() ? cmp_sparse_indices.size(-1) : 0,
          cmp_ratio,
          ori_mask_mode,
          cmp_mask_mode,
          ori_win_left,
          ori_win_right,
          mode,
          layout_q,
          layout_kv,
          has_cmp()};
}

void Attention::check_keys(const paged::Side& side, int64_t batch, int64_t mode) const {
  paged::check_keys(side, layout_q, batch);
  const int64_t width = mode == 0 ? kWidth : mode == 1 ? kRowBytes : kPagedRowBytes;
  require(side.x.size(-1) == width, side.name, show(side.x),
          "512 values, rows of 608 bytes (quant_mode 1) or 584 (quant_mode 2)");
  require(mode != 0 || side.x.scalar_type() == q.scalar_type(), side.name, show(side.x),
          "the dtype of q");
}

void Attention::check_common(const Types& of_queries, const Types& of_keys, int64_t mode) const {
  const Types& ints = paged::kLengths;
  check_table({{"q", q, true, of_queries, 3, 4, kDocument},
               {"ori_kv", ori_kv, true, of_keys, 3, 4, kDocument},
               {"cmp_kv", cmp_kv, false, of_keys, 3, 4, kDocument},
               {"cmp_sparse_indices", cmp_sparse_indices, false, kInts, 3, 4, kDocument},
               {"ori_block_table", ori_block_table, false, kInts, 2, 2, kDocument},
               {"cmp_block_table", cmp_block_table, false, kInts, 2, 2, kDocument},
               {"cu_seqlens_q", cu_seqlens_q, false, ints, 1, 1, kDocument},
               {"cu_seqlens_ori_kv", cu_seqlens_ori_kv, false, ints, 1, 1, kDocument},
               {"cu_seqlens_cmp_kv", cu_seqlens_cmp_kv, false, ints, 1, 1, kDocument},
               {"seqused_ori_kv", seqused_ori_kv, false, ints, 1, 1, kDocument},
               {"seqused_cmp_kv", seqused_cmp_kv, false, ints, 1, 1, kDocument},
               {"cmp_residual_kv", cmp_residual_kv, false, ints, 1, 1, kDocument},
               {"sinks", sinks, true, kSingle, 1, 1, kDocument},
               {"metadata", metadata, true, kInts, 1, 1, kDocument},
               {"attention_out", *attention_out, true, of_queries, 3, 4, kDocument}});
  for (const auto& [x, name] : {std::pair(ori_sparse_indices, "ori_sparse_indices"),
                                {ori_topk_length, "ori_topk_length"},
                                {cmp_topk_length, "cmp_topk_length"}})
    require(!given(x), name, show(x), "nothing");
  paged::check_queries(queries(), false);
  require(q.size(-1) == kWidth, "q", show(q), "heads of 512");
  plan("", mode).check();
  const int64_t batch = paged::batch_size(queries()), heads = q.size(-2);
  check_keys(original(), batch, mode);
  require(sinks.numel() == heads, "sinks", show(sinks), "a value for each head");
  require(has_cmp() || !chooses(), "cmp_sparse_indices", show(cmp_sparse_indices),
          "nothing without cmp_kv");
  require(has_cmp() == given(cmp_residual_kv) || batch == 0, "cmp_residual_kv",
          show(cmp_residual_kv), "[B] with cmp_kv, else nothing");
  if (has_cmp()) {
    check_keys(compressed(), batch, mode);
    require(cmp_residual_kv.numel() == batch, "cmp_residual_kv", show(cmp_residual_kv), "[B]");
  }
  if (chooses()) {
    std::vector<int64_t> shape = q.sizes().vec();
    shape[shape.size() - 2] = 1;
    shape.back() = cmp_sparse_indices.size(-1);
    require(cmp_sparse_indices.sizes() == at::IntArrayRef(shape), "cmp_sparse_indices",
            show(cmp_sparse_indices), "the rows of q, one head, K");
    require(on_a5() || shape.back() == 512 || shape.back() == 1024, "cmp_sparse_indices",
            show(cmp_sparse_indices), "K 512 or 1024 on A2 and A3");
    paged::check_dense(cmp_sparse_indices, "cmp_sparse_indices");
  }
  require(topk_value_mode == 1, "topk_value_mode", text(topk_value_mode), "1");
  paged::check_metadata(metadata);
  require(attention_out->sizes() == q.sizes() && attention_out->scalar_type() == q.scalar_type(),
          "attention_out", show(*attention_out), "shape and dtype of q");
  require(!return_softmax_lse || (softmax_lse && softmax_lse->scalar_type() == kF32 &&
                                  softmax_lse->numel() == q.numel() / kWidth),
          "softmax_lse", show(*softmax_lse), "fp32, a value for each query and head");
}

void Attention::check() const {
  require_family();
  check_common(kHalves, kHalves, 0);
}

// Our reading: the rows may be sent as uint8 or e4m3.
void Attention::check_mixed() const {
  require_family(kOnA5);
  require(quant_mode == 1 || quant_mode == 2, "quant_mode", text(quant_mode), "1 or 2");
  require(rope_head_dim == kRope, "rope_head_dim", text(rope_head_dim), "64");
  check_common({kBF16}, {at::kByte, kE4M3}, quant_mode);
}

// Entries that a query attends to. A row of indices ends at its first negative one, and the kernel
// skips what is not visible yet. Ours: an entry behind a negative one, which would be lost, faults.
std::vector<int64_t> Attention::entries(In row, int64_t visible) const {
  if (!chooses()) return paged::range(0, visible);
  std::vector<int64_t> result;
  bool ended = false;
  for (const int64_t entry : paged::values_of(row)) {
    if (ended && entry >= 0)
      paged::fault("cmp_sparse_indices",
                   "the index " + text(entry) + " stands behind a negative one and would be lost");
    ended |= entry < 0;
    if (!ended && entry < visible) result.push_back(entry);
  }
  return result;
}

// Rows of q behind the last sequence are not written. Our reading: the blocks of 512 begin anew
// where the compressed keys begin.
void Attention::attend(const Plan& plan) const {
  plan.fingerprint().expect(metadata);
  attention_out.touch();
  const int64_t batch = plan.batch, heads = plan.heads;
  const auto rows = paged::spans(queries(), batch);
  const paged::Keys original(this->original(), batch);
  const std::optional<paged::Keys> compressed =
      has_cmp() ? std::optional<paged::Keys>(std::in_place, this->compressed(), batch)
                : std::nullopt;
  const auto residual = paged::values_of(cmp_residual_kv);
  const at::Tensor flat = q.flatten(0, -3), out = attention_out->flatten(0, -3);
  const at::Tensor chosen = chooses() ? cmp_sparse_indices.flatten(0, -2) : at::Tensor();
  const auto read = [&](const paged::Keys& keys, int64_t b, const std::vector<int64_t>& which) {
    const paged::Places where = keys.places(b, which);
    if (plan.quant_mode) return dequantised(keys.pool, where, plan.quant_mode);
    return at::index(keys.pool.squeeze(2), {where.pages, where.rows});
  };
  for (int64_t b = 0; b < batch; ++b) {
    const paged::Span& span = rows[static_cast<size_t>(b)];
    const int64_t length = original.count(b), entries_held = compressed ? compressed->count(b) : 0;
    if (span.count > length)
      paged::fault("seqused_ori_kv", text(length) + " keys of sequence " + text(b) + " with " +
                                         text(span.count) + " queries");
    if (compressed) {
      const int64_t rest = residual[static_cast<size_t>(b)];
      if (rest < 0 || rest >= cmp_ratio || entries_held * cmp_ratio + rest != length)
        paged::fault("cmp_residual_kv", text(entries_held) + " entries and " + text(rest) +
                                            " of sequence " + text(b) + " do not make " +
                                            text(length) + " tokens");
    }
    for (int64_t i = 0; i < span.count; ++i) {
      const int64_t row = span.first + i, position = length - span.count + i;
      OnlineSoftmax softmax(flat[row], sinks, softmax_scale);
      softmax.add(read(original, b,
                       paged::range(std::max<int64_t>(position - ori_win_left, 0),
                                    std::min(position + ori_win_right + 1, length))));
      if (compressed)
        softmax.add(read(*compressed, b,
                         entries(chooses() ? chosen[row] : chosen,
                                 std::min(entries_held, (position + 1) / cmp_ratio))));
      out[row].copy_(softmax.out());
      if (return_softmax_lse) softmax_lse->view({-1, heads})[row].copy_(softmax.lse());
    }
  }
}

}  // namespace

NAMED(aclnnSparseFlashMlaMetadata, Metadata, plain, check, run)
NAMED(aclnnSparseFlashMla, Attention, plain, check, run)
NAMED(aclnnMixedQuantSparseFlashMlaMetadata, Metadata, mixed, check_mixed, run_mixed)
NAMED(aclnnMixedQuantSparseFlashMla, Attention, mixed, check_mixed, run_mixed)

}  // namespace softnpu::mla
