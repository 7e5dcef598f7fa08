// Random numbers inside a graph: seed and offset are read from device memory by each replay.
#include <ATen/ops/add.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/multinomial.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>

#include "graph.h"
#include "random.h"

namespace softnpu {
namespace {

int64_t value(In tensor) { return tensor.item().toLong(); }
int64_t sum(In offset, int64_t in_graph) { return value(offset) + in_graph; }

}  // namespace

OP(aclnnInplaceNormalTensor,
   [](Out x, float mean, float deviation, In seed, In offset, int64_t in_graph) {
     x = at::add(at::mul(normal(x, value(seed), sum(offset, in_graph)), deviation), mean);
   })
OP(aclnnInplaceUniformTensor,
   [](Out x, double from, double to, In seed, In offset, int64_t in_graph) {
     x = at::add(at::mul(uniform(x, value(seed), sum(offset, in_graph)), to - from), from);
   })
OP(aclnnInplaceRandomTensor,
   [](Out x, int64_t from, int64_t to, In seed, In offset, int64_t in_graph) {
     random_between(x, from, to, value(seed), sum(offset, in_graph));
   })
OP(aclnnMultinomialTensor,
   [](In x, int64_t samples, bool replacement, In seed, In offset, int64_t in_graph, Out o) {
     o = at::multinomial(x, samples, replacement, generator(value(seed), sum(offset, in_graph)));
   })
OP(aclnnDropoutGenMaskV2Tensor,
   [](Ints shape, double p, In seed, In offset, int64_t in_graph, DType_, Out mask) {
     mask = keep_bits(shape, p, value(seed), sum(offset, in_graph), mask->numel());
   })
// Its C signature is what torch_npu 2.13 was seen to send; no document names it.
OP(aclnnDropoutV3Tensor,
   [](In x, OptionalIn, double p, In seed, In offset, int64_t in_graph, Out o, Out mask) {
     mask = keep_bits(x.sizes().vec(), p, value(seed), sum(offset, in_graph), mask->numel());
     o = at::where(bits_as_bool(*mask, x.sizes()), at::div(x, 1 - p), 0);
   })

// Dropout of torch_npu's fused softmax: a byte for each value, 1 where it stays. What seeds of 0
// mean on a chip is not documented; here they are two numbers like others.
GRAPH_OP(DropOutGenMaskV3, [](const GraphArguments& a) {
  const double keep = a.in(1).to(at::kDouble).item<double>();
  const at::Tensor kept = at::rand({a.out(0)->numel()}, generator(a.attribute<int64_t>("seed"),
                                                                  a.attribute<int64_t>("seed2")))
                              .lt(keep);
  a.out(0) = kept.to(at::kByte);
})
// softmax(x1 + alpha * x2), and what stays of it over the chance to stay.
GRAPH_OP(AxpyWithSoftmaxAndDropOutDoMask, [](const GraphArguments& a) {
  const at::Tensor sum =
      at::add(a.in(0).to(at::kFloat), a.in(1).to(at::kFloat), a.attribute<double>("alpha"));
  const int64_t axis = a.attribute<std::vector<int64_t>>("axis").at(0);
  const at::Tensor soft = at::softmax(sum, axis);
  const at::Tensor kept = a.in(2).slice(0, 0, soft.numel()).view(soft.sizes());
  a.out(0) = soft;
  a.out(1) = at::div(at::mul(soft, kept), a.attribute<double>("input_keep_prob"));
})

}  // namespace softnpu
