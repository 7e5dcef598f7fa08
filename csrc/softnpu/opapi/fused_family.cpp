#include "fused_family.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/round.h>
#include <ATen/ops/where.h>

#include <cmath>

namespace softnpu {

void require_version(int major, int minor) {
  if (!cann_from(major, minor))
    throw Fault(kNnParameter, "the operator does not exist before CANN " + text(major) + "." +
                                  text(minor) + ".0 on " + config().soc);
}

void require_family(unsigned where, int code) {
  require_generation(where, code);
  require_version(9, 1);
}

at::Tensor hf32(In x) {
  const at::Tensor cut = x.contiguous().view(at::kInt).bitwise_and(~0x1FFF).view(kF32);
  return at::where(at::isfinite(x), cut, x);
}

void check_cube(int64_t cube_math_type, at::ScalarType dtype, int64_t highest) {
  const std::string found = text(cube_math_type) + " beside " + show(Types{dtype});
  require(cube_math_type >= 0 && cube_math_type <= highest, "cubeMathType", text(cube_math_type),
          ("0 to " + text(highest)).c_str());
  require(cube_math_type != 2 || dtype != kBF16, "cubeMathType", found, "no 2 (FLOAT16) for BF16");
  require(cube_math_type != 3 || dtype == kF32, "cubeMathType", found, "3 (HF32) for fp32 only");
}

at::Tensor as_cube_reads(In x, int64_t cube_math_type) {
  if (x.scalar_type() != kF32) return x;
  if (cube_math_type == 2) return x.to(kF16).to(kF32);
  return cube_math_type == 1 || cube_math_type == 3 ? hf32(x) : x;
}

at::Tensor over(In x, In scale) { return at::where(scale.eq(0), 0.0, x.div(scale)); }

at::Tensor scale_of(In range, double top) {
  return at::where(at::isfinite(range), range, NAN).div(top);
}

Int8Rows quantised_rows(In x, double top) {
  const at::Tensor scale = scale_of(at::amax(x.abs(), {-1}), top);
  const at::Tensor codes = over(x, scale.unsqueeze(-1)).nan_to_num(0.0);  // NaN has no integer
  return {at::round(codes).clamp(-top - 1, top), scale};
}

std::vector<int64_t> but_last(In x, const std::vector<int64_t>& last) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.pop_back();
  sizes.insert(sizes.end(), last.begin(), last.end());
  return sizes;
}

void require_sizes(const char* argument, In found, const std::vector<int64_t>& sizes) {
  require(found.sizes() == at::IntArrayRef(sizes), argument, show(found),
          at::str(at::IntArrayRef(sizes)).c_str());
}

}  // namespace softnpu
