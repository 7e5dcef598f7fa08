// Token sampling (spec/v4.md 8.2).
#pragma once

#include "common/isa.h"
#include "common/row_layout.h"

namespace dsv4::cpu {

// argmax(softmax(logits / temperature) / noise) over the nucleus of every row, of equals the
// smaller id. temperature: 0 is argmax of the logits.
struct Sample {
  const float* logits;
  RowLayout logits_rows;
  const float* noise;
  RowLayout noise_rows;
  float temperature;
  double top_p;
  int64_t* ids;
};

void sample(const Sample& call, Isa isa);

// The best of `count` probabilities over their noise, among those in the nucleus.
int64_t best_in_nucleus(const float* probabilities, const float* noise, int64_t count,
                        double top_p);

}  // namespace dsv4::cpu
