#include "hadamard_npu.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>

#include <cmath>
#include <map>
#include <mutex>

#include "matmul_npu.h"
#include "npu/matmul.h"

namespace dsv4::bind {
namespace {

// A product with +-1, fp32 sums, then the root and one cast.
struct Hadamard {
  static WhyNot why_not(const Context&, const at::Tensor& x) {
    return first(not_of("x", x, kFloats), empty("x", x));
  }

  static at::Tensor run(const at::Tensor& x) {
    const int64_t n = x.size(-1);
    const at::Tensor rows = x.reshape({-1, n});
    const at::Tensor sums = single_product(NpuCall("hadamard", x), rows, sylvester(x));
    const double root = 1 / std::sqrt(static_cast<double>(n));
    return sums.mul_(root).to(x.scalar_type()).view(x.sizes());
  }
};

const NpuRegistration<Hadamard, npu::Matmul> hadamard("hadamard", Kind::composite);

}  // namespace

at::Tensor sylvester(const at::Tensor& like) {
  using Key = std::tuple<int64_t, at::ScalarType, c10::DeviceIndex>;
  static std::mutex mutex;
  static auto& kept = *new std::map<Key, at::Tensor>();  // outlives the device
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& matrix = kept[{like.size(-1), like.scalar_type(), like.get_device()}];
  if (!matrix.defined()) {
    at::Tensor h = at::ones({1, 1}, like.options().device(at::kCPU));
    while (h.size(0) < like.size(-1)) {
      h = at::cat({at::cat({h, h}, 1), at::cat({h, h.neg()}, 1)});
    }
    matrix = h.to(like.device());
  }
  return matrix;
}

}  // namespace dsv4::bind
