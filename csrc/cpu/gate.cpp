#include "gate.h"

#include <cmath>

#include "parallel_rows.h"
#include "scratch.h"

#define DSV4_ROWS "cpu/gate_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
namespace {

constexpr float kIdentityAbove = 20.0f;  // of softplus, as torch has it

float score_of(float logit) {
  return std::sqrt(logit > kIdentityAbove ? logit : std::log1p(std::exp(logit)));
}

// NaN is the largest; of equals the earlier is first.
bool better(float value, int64_t expert, float than, int64_t other) {
  if (std::isnan(value) || std::isnan(than)) {
    return std::isnan(value) && (!std::isnan(than) || expert < other);
  }
  return value > than || (value == than && expert < other);
}

// The best expert that comes after `last` in the order of choice; none before the first.
int64_t next_best(const Gate& call, const float* scores, int64_t last) {
  const auto value = [&](int64_t expert) {
    return scores[expert] + call.bias[expert * call.bias_stride] * call.bias_unit;
  };
  int64_t best = -1;
  for (int64_t expert = 0; expert < call.experts; ++expert) {
    if (last >= 0 && !better(value(last), last, value(expert), expert)) {
      continue;
    }
    if (best < 0 || better(value(expert), expert, value(best), best)) {
      best = expert;
    }
  }
  return best;
}

}  // namespace

void route(const Gate& call, int64_t token, float* logits) {
  for (int64_t expert = 0; expert < call.experts; ++expert) {
    logits[expert] = score_of(logits[expert] * call.unit);
  }
  float* weights = call.weights + token * call.k;
  int32_t* ids = call.ids + token * call.k;
  float sum = 0;
  int64_t expert = -1;
  for (int64_t j = 0; j < call.k; ++j) {
    if (call.bias != nullptr) {
      expert = next_best(call, logits, expert);
    } else {
      const int64_t row = call.tokens.at(token * call.tokens_stride, call.table_rows);
      expert = call.table.at(row * call.table_strides[0] + j * call.table_strides[1], call.experts);
    }
    ids[j] = static_cast<int32_t>(expert);
    weights[j] = logits[expert];
    sum += logits[expert];
  }
  for (int64_t j = 0; j < call.k; ++j) {
    weights[j] = weights[j] / sum * call.route_scale;
  }
}

void gate(const Gate& call, Isa isa) {
  parallel_rows(call, call.x_rows.count(), call.experts * call.x_rows.width(),
                DSV4_FOR_ISA(isa, gate_rows));
}

}  // namespace dsv4::cpu
