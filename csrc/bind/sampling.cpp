#include "cpu/sampling.h"

#include <algorithm>

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

constexpr double kMinTemperature = 1e-5;
constexpr double kMinTopP = 0x1p-126;  // the smallest normal number: the best one always stays

struct SampleKernel {
  static WhyNot why_not(const Context&, const at::Tensor& logits, const at::Tensor& noise, double,
                        double) {
    return first(not_float_rows("logits", logits), not_float_rows("noise", noise));
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& logits, const at::Tensor& noise, double temperature,
                        double top_p) {
    at::Tensor ids = new_tensor({logits.size(0)}, at::kLong);
    const double warm = temperature == 0 ? 0 : std::max(temperature, kMinTemperature);
    cpu::sample({logits.const_data_ptr<float>(), rows_of(logits), noise.const_data_ptr<float>(),
                 rows_of(noise), static_cast<float>(warm), std::max(top_p, kMinTopP),
                 ids.mutable_data_ptr<int64_t>()},
                isa);
    return ids;
  }
};

const IsaRegistration<SampleKernel> sample("sample");

}  // namespace
}  // namespace dsv4::bind
