#include "candidate.h"
#include "cpu/rms_norm.h"
#include "cpu/rope.h"
#include "tensor_view.h"

namespace dsv4::bind {
namespace {

// x after the norm and, in place, RoPE of its last channels: as rms_norm and apply_rope.
at::Tensor norm_rope(const at::Tensor& x, const at::Tensor& weight, double eps,
                     const at::Tensor& cos, const at::Tensor& sin, Isa isa) {
  at::Tensor y = like(x);
  cpu::rms_norm(
      {dtype_of(x), x.const_data_ptr(), rows_of(x), dtype_of(weight), weight.const_data_ptr(),
       static_cast<float>(eps), y.mutable_data_ptr(), rows_of(y)},
      isa);
  cpu::apply_rope(
      {dtype_of(y), y.mutable_data_ptr(), rows_of(y), cos.size(0), cos.size(1),
       cos.const_data_ptr<float>(), cos.stride(0), sin.const_data_ptr<float>(), sin.stride(0)},
      isa);
  return y;
}

WhyNot not_given_rows(const char* name, const Optional& tensor) {
  return tensor ? not_float_rows(name, *tensor) : std::nullopt;
}

struct QkvNormRope {
  static WhyNot why_not(const Context&, const at::Tensor& q, const at::Tensor& kv,
                        const Optional& entries, const at::Tensor& q_weight,
                        const at::Tensor& kv_weight, const Optional& entry_weight, double,
                        const at::Tensor& cos, const at::Tensor& sin, const Optional& entry_cos,
                        const Optional& entry_sin) {
    return first(not_float_rows("q", q), not_float_rows("kv", kv),
                 not_float_rows("q_weight", q_weight), not_float_rows("kv_weight", kv_weight),
                 not_float_rows("cos", cos), not_float_rows("sin", sin),
                 not_given_rows("entries", entries), not_given_rows("entry_weight", entry_weight),
                 not_given_rows("entry_cos", entry_cos), not_given_rows("entry_sin", entry_sin));
  }

  template <Isa isa>
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> run(
      const at::Tensor& q, const at::Tensor& kv, const Optional& entries,
      const at::Tensor& q_weight, const at::Tensor& kv_weight, const Optional& entry_weight,
      double eps, const at::Tensor& cos, const at::Tensor& sin, const Optional& entry_cos,
      const Optional& entry_sin) {
    return {norm_rope(q, q_weight, eps, cos, sin, isa),
            norm_rope(kv, kv_weight, eps, cos, sin, isa),
            entries ? norm_rope(*entries, *entry_weight, eps, *entry_cos, *entry_sin, isa)
                    : new_tensor({0, kv.size(1)}, kv.scalar_type())};
  }
};

const IsaRegistration<QkvNormRope> qkv_norm_rope("qkv_norm_rope");

}  // namespace
}  // namespace dsv4::bind
