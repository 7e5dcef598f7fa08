// Numbers and limits of the attentions in fused_mla.h: docs/spec/ascend-operators.md 4.11 D and E.
#include "fused_mla.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/index.h>
#include <ATen/ops/log.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>

namespace softnpu::mla {
namespace {

constexpr int64_t kKeysPerBlock = 512, kGroup = 64, kGroups = kNope / kGroup, kScaleBytes = 8;

bool power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

at::Tensor picked(In pool, const paged::Places& places) {  // [pages, rows, bytes] -> [n, bytes]
  return at::index(pool, {places.pages, places.rows});
}

at::Tensor cut(In bytes, int64_t first, int64_t count, at::ScalarType dtype) {
  return bytes.narrow(-1, first, count).contiguous().view(dtype);
}

// e4m3 values times a scale for each 64 of them, both widened; one rounding to bf16.
at::Tensor scaled(In values, In scales) {
  const at::Tensor wide = scales.to(kF32).repeat_interleave(kGroup, -1);
  return values.to(kF32).mul(wide).to(kBF16);
}

}  // namespace

// Our reading: the limits of cmp_ratio by mode hold on A5 too, where wider windows are all that the
// emulation knows of the wider masks.
void Plan::check() const {
  if (quant_mode)
    require(heads >= 2 && heads <= 128, "num_heads_q", text(heads), "2 to 128");
  else
    require(power_of_two(heads) && heads >= (on_a5() ? 2 : 1) && heads <= 128, "num_heads_q",
            text(heads), "a power of two up to 128, on A5 from 2");
  const int64_t ratio = !has_cmp ? 1 : topk ? 4 : 128;
  require(cmp_ratio == ratio, "cmp_ratio", text(cmp_ratio),
          "1 without compressed keys, 4 with indices, 128 with all of them");
  require(ori_mask_mode == 4, "ori_mask_mode", text(ori_mask_mode), "4 (others: not emulated)");
  require(cmp_mask_mode == 3, "cmp_mask_mode", text(cmp_mask_mode), "3 (others: not emulated)");
  require(ori_win_left == 127 || (on_a5() && ori_win_left >= 0), "ori_win_left", text(ori_win_left),
          "127; on A5 0 or more");
  require(ori_win_right == 0 || (on_a5() && ori_win_right >= 0), "ori_win_right",
          text(ori_win_right), "0; on A5 0 or more");
  require(layout_q == "TND" || layout_q == "BSND", "layout_q", layout_q, "TND or BSND");
  require(layout_kv == "PA_BBND" || (layout_kv == layout_q && quant_mode != 2), "layout_kv",
          layout_kv, "PA_BBND, or layout_q (not with quant_mode 2)");
}

paged::Fingerprint Plan::fingerprint() const {
  paged::Fingerprint result(reader);
  result.add_lengths("cu_seqlens_q", cu_seqlens_q);
  result.add_lengths("cu_seqlens_ori_kv", cu_seqlens_ori_kv);
  result.add_lengths("cu_seqlens_cmp_kv", cu_seqlens_cmp_kv);
  result.add_lengths("seqused_ori_kv", seqused_ori_kv);
  result.add_lengths("seqused_cmp_kv", seqused_cmp_kv);
  result.add_lengths("cmp_residual_kv", cmp_residual_kv);
  result.add("num_heads_q", heads);
  result.add("batch_size", batch);
  result.add("max_seqlen_q", queries);
  result.add("cmp_topk", topk);
  result.add("cmp_ratio", cmp_ratio);
  result.add("ori_win_left", ori_win_left);
  result.add("ori_win_right", ori_win_right);
  result.add("layout_q", layout_q);
  result.add("layout_kv", layout_kv);
  result.add("has_cmp_kv", static_cast<int64_t>(has_cmp));
  result.add("quant_mode", quant_mode);
  return result;
}

at::Tensor dequantised(In pool, const paged::Places& places, int64_t quant_mode) {
  const at::Tensor bytes = pool.view(at::kByte).squeeze(2);
  if (quant_mode == 1) {  // 64 rotated values, 448 e4m3, 7 bf16 scales, padding
    const at::Tensor row = picked(bytes, places);
    const int64_t rope = 2 * kRope;
    return at::cat(
        {scaled(cut(row, rope, kNope, kE4M3), cut(row, rope + kNope, 2 * kGroups, kBF16)),
         cut(row, 0, rope, kBF16)},
        -1);
  }
  // A page: its rows of 448 e4m3 and 64 rotated values, then 7 e8m0 scales and a byte for each row.
  const int64_t pages = bytes.size(0), rows = bytes.size(1), width = kNope + 2 * kRope;
  const auto part = [&](int64_t first, int64_t count) {
    return picked(bytes.as_strided({pages, rows, count}, {bytes.stride(0), count, 1},
                                   bytes.storage_offset() + first),
                  places);
  };
  const at::Tensor row = part(0, width), scales = part(rows * width, kScaleBytes);
  return at::cat({scaled(cut(row, 0, kNope, kE4M3), cut(scales, 0, kGroups, kE8M0)),
                  cut(row, kNope, 2 * kRope, kBF16)},
                 -1);
}

OnlineSoftmax::OnlineSoftmax(In q, In sinks, double scale)
    : q_(q.to(kF32)),
      top_(sinks.unsqueeze(-1).to(kF32)),
      sum_(at::ones_like(top_)),
      out_(at::zeros({q.size(0), kWidth}, kF32)),
      rounded_(q.scalar_type()),
      scale_(scale) {}

void OnlineSoftmax::add(In keys) {
  for (int64_t first = 0; first < keys.size(0); first += kKeysPerBlock) {
    const at::Tensor k =
        keys.slice(0, first, std::min(first + kKeysPerBlock, keys.size(0))).to(kF32);
    const at::Tensor logits = at::matmul(q_, k.t()).mul(scale_);
    const at::Tensor top = at::maximum(top_, at::amax(logits, {-1}, true));
    const at::Tensor p = at::exp(logits.sub(top)), kept = at::exp(top_.sub(top));
    sum_ = sum_.mul(kept).add(p.sum(-1, true));
    out_ = out_.mul(kept).add(at::matmul(p.to(rounded_).to(kF32), k));
    top_ = top;
  }
}

at::Tensor OnlineSoftmax::out() const { return out_.div(sum_); }
at::Tensor OnlineSoftmax::lse() const { return top_.add(at::log(sum_)).squeeze(-1); }

}  // namespace softnpu::mla
