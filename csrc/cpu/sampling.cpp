#include "sampling.h"

#include <algorithm>
#include <numeric>
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
  if (candidates.empty()) {
    return 0;
  }
  // The candidate of rank `first` is in the nucleus, that of rank `last` is not; no need to rank
  // the others.
  auto first = candidates.begin(), last = candidates.end();
  double better = 0;  // what those before `first` hold
  while (last - first > 1) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last);
    const double held = std::accumulate(
        first, middle, better, [](double sum, const Candidate& c) { return sum + c.probability; });
    if (held < top_p) {
      better = held;
      first = middle;
    } else {
      last = middle;
    }
  }
  int64_t best = 0;
  float largest = 0;
  for (auto candidate = candidates.begin(); candidate != last; ++candidate) {
    const float ratio = candidate->probability / noise[candidate->id];
    if (ratio > largest || (ratio == largest && candidate->id < best)) {
      largest = ratio;
      best = candidate->id;
    }
  }
  return best;
}

void sample(const Sample& call, Isa isa) {
  parallel_rows(call, call.logits_rows.count(), 8 * call.logits_rows.width(),
                DSV4_FOR_ISA(isa, sample_rows));
}

}  // namespace dsv4::cpu
