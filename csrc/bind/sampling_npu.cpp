#include <ATen/ops/empty.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>

#include "npu/elementary.h"
#include "npu_call.h"

namespace dsv4::bind {
namespace {

constexpr double kLeastTemperature = 1e-5;
constexpr double kLeastTopP = std::numeric_limits<float>::min();

// 0 for a token whose betters hold at least top_p together.
at::Tensor nucleus(const at::Tensor& probabilities, double top_p) {
  auto [best_first, order] = at::sort(probabilities, /*stable=*/true, -1, /*descending=*/true);
  const at::Tensor better = best_first.cumsum(-1).sub_(best_first);
  best_first.masked_fill_(better.ge(std::max(top_p, kLeastTopP)), 0);
  return at::zeros_like(probabilities).scatter_(-1, order, best_first);
}

// What the token of a row is the largest of.
at::Tensor race(const at::Tensor& logits, const at::Tensor& noise, double temperature,
                double top_p) {
  if (temperature == 0) {
    return logits;
  }
  const at::Tensor probabilities =
      at::softmax(logits.div(std::max(temperature, kLeastTemperature)), -1);
  return (top_p < 1 ? nucleus(probabilities, top_p) : probabilities).div(noise);
}

struct Sample {
  static WhyNot why_not(const Context&, const at::Tensor& logits, const at::Tensor& noise, double,
                        double) {
    return first(not_of("logits", logits, {at::kFloat}), not_of("noise", noise, {at::kFloat}),
                 empty("logits", logits));
  }

  static at::Tensor run(const at::Tensor& logits, const at::Tensor& noise, double temperature,
                        double top_p) {
    const at::Tensor scores = race(logits, noise, temperature, top_p);
    at::Tensor ids = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
    const NpuCall call("sample", logits);
    call.launch(npu::ArgMax{call.in(scores), int64_t{-1}, false, call.out(ids)});
    return ids;
  }
};

const NpuRegistration<Sample, npu::ArgMax> sample("sample", Kind::composite);

}  // namespace
}  // namespace dsv4::bind
