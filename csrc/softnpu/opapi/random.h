// Random numbers of an operator: drawn anew from (seed, offset) each time, whatever ran before.
#pragma once

#include <ATen/core/Generator.h>

#include "op.h"

namespace softnpu {

at::Generator generator(int64_t seed, int64_t offset);
at::Tensor normal(const Out& like, int64_t seed, int64_t offset);
at::Tensor uniform(const Out& like, int64_t seed, int64_t offset);
void random_between(const Out& x, int64_t from, int64_t to, int64_t seed, int64_t offset);
// One bit per element, least significant first; set = kept.
at::Tensor keep_bits(Ints shape, double p, int64_t seed, int64_t offset, int64_t bytes);
at::Tensor bits_as_bool(const at::Tensor& bits, at::IntArrayRef sizes);

}  // namespace softnpu
