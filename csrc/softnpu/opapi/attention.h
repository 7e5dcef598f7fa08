// FlashAttentionScore of one batch: what the layouts with and without axes of sequences share.
#pragma once

#include "op.h"

namespace softnpu {

struct AttentionSetting {
  double scale, keep;
  int64_t before, after, heads, sparse;
  std::string layout;  // BNSD, BSND, BSH or SBH
};
// Refuses what is not emulated.
AttentionSetting attention_setting(double scale, double keep, int64_t before, int64_t after,
                                   int64_t heads, Text layout, int64_t sparse, OptionalIn pse,
                                   OptionalIn drop);
// largest and sum: [B, N, S, 8]
void attention_forward(In q, In k, In v, OptionalIn mask, OptionalIn drop,
                       const AttentionSetting& s, Out largest, Out sum, Out o);
void attention_backward(In q, In k, In v, In gradient, OptionalIn mask, OptionalIn drop,
                        const AttentionSetting& s, Out dq, Out dk, Out dv);

}  // namespace softnpu
