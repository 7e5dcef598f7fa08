// Attention of CANN 9.1's V4 family: 512-wide heads that share one row as key and value, in a
// window of the original rows, and over compressed rows, all of them or chosen ones.
#pragma once

#include "fused_metadata.h"

namespace softnpu::mla {

inline constexpr int64_t kWidth = 512, kRope = 64, kNope = kWidth - kRope;

// What the metadata depends on.
struct Plan {
  const char* reader;
  at::Tensor cu_seqlens_q, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q, seqused_ori_kv,
      seqused_cmp_kv, cmp_residual_kv;
  int64_t heads, batch, queries, topk, cmp_ratio, ori_mask_mode, cmp_mask_mode, ori_win_left,
      ori_win_right, quant_mode;  // queries: S of BSND, -1 with TND
  std::string layout_q, layout_kv;
  bool has_cmp;

  void check() const;  // heads, ratio, masks, window, layouts
  paged::Fingerprint fingerprint() const;
};

// One row of quantised keys for each place, dequantised to bf16. Modes of MixedQuantSparseFlashMla:
// 1, rows of 608 bytes; 2, pages whose scales stand behind their rows.
inline constexpr int64_t kRowBytes = 608, kPagedRowBytes = 584;
at::Tensor dequantised(In pool, const paged::Places& places, int64_t quant_mode);

// Softmax over blocks of 512 keys as they come. The sink is there from the start, with weight 1. P
// is rounded to the queries' dtype before it meets V; sums and products are fp32.
class OnlineSoftmax {
 public:
  OnlineSoftmax(In q, In sinks, double scale);  // q [H, 512], sinks [H]
  void add(In keys);                            // [n, 512]
  at::Tensor out() const;                       // [H, 512] in fp32
  at::Tensor lse() const;                       // [H]: the sink is part of it (our reading)

 private:
  at::Tensor q_, top_, sum_, out_;
  at::ScalarType rounded_;
  double scale_;
};

}  // namespace softnpu::mla
