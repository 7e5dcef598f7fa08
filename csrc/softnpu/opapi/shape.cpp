// Copying, filling, joining, padding, ranges, random numbers.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/div.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/flip.h>
#include <ATen/ops/ge.h>
#include <ATen/ops/index_add.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/logspace.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/multinomial.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/normal.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/range.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/tril.h>
#include <ATen/ops/triu.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "checked.h"
#include "random.h"

namespace softnpu {

at::Generator generator(int64_t seed, int64_t offset) {
  return at::detail::createCPUGenerator(static_cast<uint64_t>(seed) * 0x9E3779B97F4A7C15ull +
                                        static_cast<uint64_t>(offset));
}

at::Tensor normal(const Out& like, int64_t seed, int64_t offset) {
  return at::normal(0.0, 1.0, like->sizes(), generator(seed, offset),
                    at::TensorOptions().dtype(at::kFloat));
}

void random_between(const Out& x, int64_t from, int64_t to, int64_t seed, int64_t offset) {
  x = at::randint(from, to, x->sizes(), generator(seed, offset),
                  at::TensorOptions().dtype(at::kLong));
}

at::Tensor uniform(const Out& like, int64_t seed, int64_t offset) {
  return at::rand(like->sizes(), generator(seed, offset), at::TensorOptions().dtype(at::kFloat));
}

namespace {

std::string shown_sizes(In x) { return shown(x.sizes().vec()); }

// aclnnCat.md: sizes alike but on `dim` (torch's [0] counts as nothing), a result that holds them
// all, and a dtype to which the common one may be cast.
void check_cat(Ins parts, int64_t dim, const Out& o) {
  const at::Tensor* first = nullptr;
  int64_t length = 0;
  at::ScalarType common = parts.empty() ? o->scalar_type() : parts[0].scalar_type();
  for (const at::Tensor& part : parts) {
    common = c10::promoteTypes(common, part.scalar_type());
    if (part.dim() == 1 && part.numel() == 0) continue;
    if (!first) first = &part;
    const int64_t axis = dim < 0 ? dim + first->dim() : dim;
    bool alike = part.dim() == first->dim() && axis >= 0 && axis < part.dim();
    for (int64_t i = 0; alike && i < part.dim(); ++i)
      alike = i == axis || part.size(i) == first->size(i);
    if (!alike)
      throw Fault(kNnParameter,
                  "argument 'tensors': Sizes of tensors must match except in dimension " +
                      std::to_string(dim) + ": found " + shown_sizes(part) + " beside " +
                      shown_sizes(*first));
    length += part.size(axis);
  }
  if (!c10::canCast(common, o->scalar_type()))
    throw Fault(kNnParameter, std::string("argument 'out': found ") +
                                  c10::toString(o->scalar_type()) + ", expected a dtype to which " +
                                  c10::toString(common) + " may be cast");
  if (!first) return;
  std::vector<int64_t> sizes = first->sizes().vec();
  sizes[static_cast<size_t>(dim < 0 ? dim + first->dim() : dim)] = length;
  if (o->sizes() != at::IntArrayRef(sizes))
    throw Fault(kNnParameter,
                "argument 'out': found " + shown_sizes(*o) + ", expected " + shown(sizes));
}

}  // namespace

at::Tensor keep_bits(Ints shape, double p, int64_t seed, int64_t offset, int64_t bytes) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  const at::Tensor kept = at::ge(at::rand({bytes * 8}, generator(seed, offset)), p).to(at::kByte);
  kept.slice(0, elements).zero_();
  return at::sum(
             at::mul(kept.view({bytes, 8}), at::tensor({1, 2, 4, 8, 16, 32, 64, 128}, at::kInt)), 1)
      .to(at::kByte);
}

at::Tensor bits_as_bool(In bytes, at::IntArrayRef sizes) {
  const at::Tensor bits = at::bitwise_and(bytes.view(at::kByte).reshape({-1, 1}),
                                          at::tensor({1, 2, 4, 8, 16, 32, 64, 128}, at::kByte))
                              .ne(0);
  return bits.reshape({-1}).slice(0, 0, c10::multiply_integers(sizes)).view(sizes);
}

OP(aclnnInplaceCopy, [](Out x, In source) {
  x = source.dim() > x->dim() ? source.reshape(x->sizes()) : source.expand(x->sizes());
})
OP(aclnnInplaceOne, [](Out x) { x.touch(), x->fill_(1); })
OP(aclnnInplaceZero, [](Out x) { x.touch(), x->fill_(0); })
OP(aclnnInplaceFillScalar, [](Out x, Scalar value) { x.touch(), x->fill_(value); })
OP(aclnnInplaceFillTensor, [](Out x, In value) { x.touch(), x->fill_(value.reshape({})); })
OP(aclnnInplaceFillDiagonal,
   [](Out x, Scalar value, bool wrap) { x.touch(), x->fill_diagonal_(value, wrap); })
CHECKED_OP(aclnnCat, check_cat, [](Ins parts, int64_t dim, Out o) { o = at::cat(parts, dim); })
OP(aclnnStack, [](Ins parts, int64_t dim, Out o) { o = at::stack(parts, dim); })
OP(aclnnRepeat, [](In x, Ints repeats, Out o) { o = x.repeat(repeats); })
OP(aclnnFlip, [](In x, Ints dims, Out o) { o = at::flip(x, dims); })
OP(aclnnRoll, [](In x, Ints shifts, Ints dims, Out o) { o = at::roll(x, shifts, dims); })
OP(aclnnTril, [](In x, int64_t diagonal, Out o) { o = at::tril(x, diagonal); })
OP(aclnnTriu, [](In x, int64_t diagonal, Out o) { o = at::triu(x, diagonal); })
OP(aclnnInplaceTril, [](Out x, int64_t diagonal) { x = at::tril(*x, diagonal); })
OP(aclnnInplaceTriu, [](Out x, int64_t diagonal) { x = at::triu(*x, diagonal); })
OP(aclnnConstantPadNd,
   [](In x, Ints pad, Scalar value, Out o) { o = at::constant_pad_nd(x, pad, value); })
OP(aclnnEye, [](int64_t rows, int64_t columns, Out o) { o = at::eye(rows, columns); })
OP(aclnnArange, [](Scalar start, Scalar end, Scalar step, Out o) {
  o = at::arange(start, end, step, at::TensorOptions().dtype(o->scalar_type()));
})
OP(aclnnRange, [](Scalar start, Scalar end, Scalar step, Out o) {
  o = at::range(start, end, step, at::TensorOptions().dtype(o->scalar_type()));
})
OP(aclnnLinspace, [](Scalar start, Scalar end, int64_t steps, Out o) {
  const auto values = at::linspace(start, end, steps, at::TensorOptions().dtype(o->scalar_type()));
  o = values.reshape(o->sizes());  // an output of other sizes is kept: our reading
})
OP(aclnnRepeatInterleave,
   [](In x, In repeats, int64_t, Out o) { o = at::repeat_interleave(x, repeats); })
OP(aclnnRepeatInterleaveInt,
   [](In x, int64_t repeats, int64_t, Out o) { o = at::repeat_interleave(x, repeats); })
OP(aclnnRepeatInterleaveWithDim, [](In x, In repeats, int64_t dim, int64_t, Out o) {
  o = at::repeat_interleave(x, repeats, dim);
})
OP(aclnnRepeatInterleaveIntWithDim, [](In x, int64_t repeats, int64_t dim, int64_t, Out o) {
  o = at::repeat_interleave(x, repeats, dim);
})

OP(aclnnInplaceNormal, [](Out x, float mean, float deviation, int64_t seed, int64_t offset) {
  x = at::add(at::mul(normal(x, seed, offset), deviation), mean);
})
OP(aclnnNormalFloatFloat, [](float mean, float deviation, int64_t seed, int64_t offset, Out o) {
  o = at::add(at::mul(normal(o, seed, offset), deviation), mean);
})
OP(aclnnNormalTensorFloat, [](In mean, float deviation, int64_t seed, int64_t offset, Out o) {
  o = at::add(at::mul(normal(o, seed, offset), deviation), mean);
})
OP(aclnnNormalTensorTensor, [](In mean, In deviation, int64_t seed, int64_t offset, Out o) {
  o = at::add(at::mul(normal(o, seed, offset), deviation), mean);
})
OP(aclnnInplaceUniform, [](Out x, double from, double to, uint64_t seed, uint64_t offset) {
  x = at::add(
      at::mul(uniform(x, static_cast<int64_t>(seed), static_cast<int64_t>(offset)), to - from),
      from);
})
OP(aclnnInplaceBernoulli,
   [](Out x, Scalar p, int64_t seed, int64_t offset) { x = at::lt(uniform(x, seed, offset), p); })
OP(aclnnInplaceBernoulliTensor,
   [](Out x, In p, int64_t seed, int64_t offset) { x = at::lt(uniform(x, seed, offset), p); })
OP(aclnnInplaceRandom, [](Out x, int64_t from, int64_t to, int64_t seed, int64_t offset) {
  random_between(x, from, to, seed, offset);
})
OP(aclnnSimThreadExponential, [](Out x, int64_t, float rate, int64_t seed, int64_t offset) {
  x = at::div(at::neg(at::log1p(at::neg(uniform(x, seed, offset)))), rate);
})
OP(aclnnRandperm, [](int64_t n, int64_t seed, int64_t offset, Out o) {
  o = at::randperm(n, generator(seed, offset), at::TensorOptions().dtype(at::kLong));
})
OP(aclnnMultinomial,
   [](In x, int64_t samples, bool replacement, int64_t seed, int64_t offset, Out o) {
     o = at::multinomial(x, samples, replacement, generator(seed, offset));
   })
OP(aclnnDropoutGenMask, [](Ints shape, double p, int64_t seed, int64_t offset, Out mask) {
  mask = keep_bits(shape, p, seed, offset, mask->numel());
})
OP(aclnnDropoutGenMaskV2, [](Ints shape, double p, int64_t seed, int64_t offset, DType_, Out mask) {
  mask = keep_bits(shape, p, seed, offset, mask->numel());
})
OP(aclnnDropoutDoMask, [](In x, In mask, double p, Out o) {
  o = at::where(bits_as_bool(mask, x.sizes()), at::div(x, 1 - p), 0);
})
OP(aclnnDropoutV3, [](In x, OptionalIn, double p, int64_t seed, int64_t offset, Out o, Out mask) {
  mask = keep_bits(x.sizes().vec(), p, seed, offset, mask->numel());
  o = at::where(bits_as_bool(*mask, x.sizes()), at::div(x, 1 - p), 0);
})

namespace {

// `noise` gets the factor of each value: between low and high where x <= 0, else 1.
at::Tensor rrelu(In x, Out noise, Scalar low, Scalar high, bool training, int64_t seed,
                 int64_t offset) {
  if (!training) {
    noise.touch();
    return at::where(x.gt(0), x, at::mul(x, (low.toDouble() + high.toDouble()) / 2));
  }
  const at::Tensor factor =
      at::add(at::mul(uniform(noise, seed, offset), high.toDouble() - low.toDouble()), low);
  noise = at::where(x.gt(0), at::ones_like(factor), factor);
  return at::mul(x, *noise);
}

}  // namespace

OP(aclnnRReluWithNoise,
   [](In x, Out noise, Scalar low, Scalar high, bool training, int64_t seed, int64_t offset,
      Out o) { o = rrelu(x, noise, low, high, training, seed, offset); })
OP(aclnnInplaceRReluWithNoise,
   [](Out x, Out noise, Scalar low, Scalar high, bool training, int64_t seed, int64_t offset) {
     x = rrelu(*x, noise, low, high, training, seed, offset);
   })
OP(aclnnLogSpace, [](Scalar start, Scalar end, int64_t steps, double base, Out o) {
  o = at::logspace(start, end, steps, base, at::TensorOptions().dtype(o->scalar_type()));
})
// The gradient of each value is the sum over its copies.
OP(aclnnRepeatInterleaveGrad, [](In gradient, In repeats, int64_t dim, Out o) {
  const at::Tensor place = at::repeat_interleave(repeats.to(at::kLong));
  o = at::index_add(at::zeros_like(*o), dim, place, gradient.to(o->scalar_type()));
})

}  // namespace softnpu
