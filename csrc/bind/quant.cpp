#include "cpu/quant.h"

#include "candidate.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

template <cpu::BlockFormat format>
struct QuantiseKernel {
  static WhyNot why_not(const Context&, const at::Tensor& x, int64_t) {
    return not_float_rows("x", x);
  }

  template <Isa isa>
  static std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& x, int64_t block_size) {
    constexpr bool packed = format == cpu::BlockFormat::e2m1;
    const int64_t width = x.size(-1);
    at::Tensor codes =
        with_last(x, packed ? width / 2 : width, packed ? at::kChar : at::kFloat8_e4m3fn);
    at::Tensor scales =
        with_last(x, cpu::block_count(width, block_size), at::ScalarType::Float8_e8m0fnu);
    cpu::quantise({format, dtype_of(x), x.const_data_ptr(), rows_of(x), block_size,
                   static_cast<uint8_t*>(codes.mutable_data_ptr()),
                   static_cast<uint8_t*>(scales.mutable_data_ptr())},
                  isa);
    return {std::move(codes), std::move(scales)};
  }
};

at::Tensor round_trip(cpu::BlockFormat format, const at::Tensor& x, int64_t block_size,
                      int64_t channels, Isa isa) {
  at::Tensor y = new_tensor(x.sizes(), x.scalar_type());
  cpu::round_trip({format, dtype_of(x), x.const_data_ptr(), rows_of(x), block_size, channels,
                   y.mutable_data_ptr()},
                  isa);
  return y;
}

struct ActQdq {
  static WhyNot why_not(const Context&, const at::Tensor& x, int64_t, int64_t) {
    return not_float_rows("x", x);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, int64_t block_size, int64_t channels) {
    return round_trip(cpu::BlockFormat::e4m3, x, block_size, channels, isa);
  }
};

struct Fp4Qdq {
  static WhyNot why_not(const Context&, const at::Tensor& x, int64_t) {
    return not_float_rows("x", x);
  }

  template <Isa isa>
  static at::Tensor run(const at::Tensor& x, int64_t block_size) {
    return round_trip(cpu::BlockFormat::e2m1, x, block_size, x.size(-1), isa);
  }
};

const IsaRegistration<QuantiseKernel<cpu::BlockFormat::e4m3>> act_quant("act_quant");
const IsaRegistration<QuantiseKernel<cpu::BlockFormat::e2m1>> fp4_quant("fp4_quant");
const IsaRegistration<ActQdq> act_qdq("act_qdq");
const IsaRegistration<Fp4Qdq> fp4_qdq("fp4_qdq");

}  // namespace
}  // namespace dsv4::bind
