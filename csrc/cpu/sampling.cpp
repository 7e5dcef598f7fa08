#include "sampling.h"

#include <algorithm>
#include <vector>

#include "parallel_rows.h"
#include "scratch.h"

#define DSV4_ROWS "cpu/sampling_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
namespace {

struct Candidate {
  float probability;
  int64_t id;

  bool operator<(const Candidate& other) const {  // better first
    return probability > other.probability || (probability == other.probability && id < other.id);
  }
};

}  // namespace

int64_t best_in_nucleus(const float* probabilities, const float* noise, int64_t count,
                        double top_p) {
  thread_local std::vector<Candidate> candidates;
  candidates.clear();
  for (int64_t id = 0; id < count; ++id) {
    if (probabilities[id] > 0) {
      candidates.push_back({probabilities[id], id});
    }
  }
  int64_t best = 0;
  float largest = 0;
  double better = 0;  // probability of those ranked before
  // Ranks as many as are needed: a nucleus is a small part of a vocabulary.
  size_t ranked = 0;
  for (size_t i = 0; i < candidates.size() && better < top_p; ++i) {
    if (i == ranked) {
      ranked = std::min(candidates.size(), std::max<size_t>(64, 4 * ranked));
      const auto from = candidates.begin() + static_cast<int64_t>(i);
      const auto to = candidates.begin() + static_cast<int64_t>(ranked);
      if (to != candidates.end()) {
        std::nth_element(from, to, candidates.end());
      }
      std::sort(from, to);
    }
    const auto [probability, id] = candidates[i];
    const float ratio = probability / noise[id];
    if (ratio > largest || (ratio == largest && id < best)) {
      largest = ratio;
      best = id;
    }
    better += static_cast<double>(probability);
  }
  return best;
}

void sample(const Sample& call, Isa isa) {
  parallel_rows(call, call.logits_rows.count(), 8 * call.logits_rows.width(),
                DSV4_FOR_ISA(isa, sample_rows));
}

}  // namespace dsv4::cpu
