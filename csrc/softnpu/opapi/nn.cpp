// Softmax, normalisations, losses, optimiser steps.
#include <ATen/ops/_ctc_loss.h>
#include <ATen/ops/_ctc_loss_backward.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addcdiv.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/binary_cross_entropy.h>
#include <ATen/ops/binary_cross_entropy_backward.h>
#include <ATen/ops/binary_cross_entropy_with_logits.h>
#include <ATen/ops/div.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/glu.h>
#include <ATen/ops/glu_backward.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/kl_div.h>
#include <ATen/ops/l1_loss.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/log.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/mse_loss_backward.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/multilabel_margin_loss_forward.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/native_group_norm.h>
#include <ATen/ops/native_group_norm_backward.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/nll_loss2d_backward.h>
#include <ATen/ops/nll_loss2d_forward.h>
#include <ATen/ops/nll_loss_backward.h>
#include <ATen/ops/nll_loss_forward.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/smooth_l1_loss.h>
#include <ATen/ops/smooth_l1_loss_backward.h>
#include <ATen/ops/soft_margin_loss.h>
#include <ATen/ops/soft_margin_loss_backward.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>

#include "op.h"

namespace softnpu {
namespace {

// A loss's derivative by each value of x, for reduction 1 (mean) or the others (none, sum).
at::Tensor reduced(In gradient, In x, int64_t reduction) {
  return reduction == 1 ? at::div(gradient, x.numel()) : gradient;
}

// The statistics of half-precision values are fp32, which ATen's kernels do not mix with them.
at::Tensor in_fp32(In x) {
  return at::isReducedFloatingType(x.scalar_type()) ? x.to(at::kFloat) : x;
}
std::optional<at::Tensor> in_fp32(OptionalIn x) {
  return x ? std::optional(in_fp32(*x)) : std::nullopt;
}

}  // namespace
OP(aclnnSoftmax, [](In x, int64_t dim, Out o) { o = at::softmax(x, dim, o->scalar_type()); })
OP(aclnnSoftmaxBackward, [](In gradient, In y, int64_t dim, Out o) {
  o = at::_softmax_backward_data(gradient, y, dim, y.scalar_type());
})
OP(aclnnLogSoftmax, [](In x, int64_t dim, Out o) { o = at::log_softmax(x, dim, o->scalar_type()); })
OP(aclnnLogSoftmaxBackward, [](In gradient, In y, int64_t dim, Out o) {
  o = at::_log_softmax_backward_data(gradient, y, dim, y.scalar_type());
})
OP(aclnnGlu, [](In x, int64_t dim, Out o) { o = at::glu(x, dim); })
OP(aclnnGluBackward,
   [](In gradient, In x, int64_t dim, Out o) { o = at::glu_backward(gradient, x, dim); })

OP(aclnnLayerNorm, [](In x, Ints shape, OptionalIn weight, OptionalIn bias, double eps, Out o,
                      OptionalOut mean, OptionalOut rstd) {
  const auto [y, m, r] =
      at::native_layer_norm(in_fp32(x), shape, in_fp32(weight), in_fp32(bias), eps);
  o = y;
  if (mean && m.numel()) mean = m;
  if (rstd && r.numel()) rstd = r;
})
OP(aclnnLayerNormBackward,
   [](In gradient, In x, Ints shape, In mean, In rstd, OptionalIn weight, OptionalIn bias,
      Bools mask, OptionalOut dx, OptionalOut dweight, OptionalOut dbias) {
     const auto [gx, gw, gb] = at::native_layer_norm_backward(
         in_fp32(gradient), in_fp32(x), shape, in_fp32(mean), in_fp32(rstd), in_fp32(weight),
         in_fp32(bias), {mask[0], mask[1], mask[2]});
     if (mask[0]) dx = gx;
     if (mask[1] && weight) dweight = gw;
     if (mask[2] && bias) dbias = gb;
   })
OP(aclnnGroupNorm, [](In x, OptionalIn weight, OptionalIn bias, int64_t n, int64_t c,
                      int64_t spatial, int64_t groups, double eps, Out o, Out mean, Out rstd) {
  const auto [y, m, r] =
      at::native_group_norm(in_fp32(x), in_fp32(weight), in_fp32(bias), n, c, spatial, groups, eps);
  o = y;
  mean = m;
  rstd = r;
})
OP(aclnnBatchNorm, [](In x, OptionalIn weight, OptionalIn bias, OptionalOut running_mean,
                      OptionalOut running_var, bool training, double momentum, double eps, Out o,
                      Out mean, Out rstd) {
  const auto [y, m, r] =
      at::native_batch_norm(x, weight, bias, *running_mean, *running_var, training, momentum, eps);
  o = y;
  if (training) mean = m, rstd = r;
})

OP(aclnnGroupNormBackward,
   [](In gradient, In x, In mean, In rstd, OptionalIn weight, int64_t n, int64_t c, int64_t spatial,
      int64_t groups, Bools mask, OptionalOut dx, OptionalOut dweight, OptionalOut dbias) {
     const auto [gx, gw, gb] = at::native_group_norm_backward(
         in_fp32(gradient), in_fp32(x), in_fp32(mean), in_fp32(rstd), in_fp32(weight), n, c,
         spatial, groups, {mask[0], mask[1], mask[2]});
     if (mask[0]) dx = gx;
     if (mask[1] && weight) dweight = gw;
     if (mask[2] && dbias) dbias = gb;
   })
OP(aclnnBatchNormBackward, [](In gradient, In x, OptionalIn weight, OptionalIn running_mean,
                              OptionalIn running_var, OptionalIn mean, OptionalIn rstd,
                              bool training, double eps, Bools mask, OptionalOut dx,
                              OptionalOut dweight, OptionalOut dbias) {
  const auto [gx, gw, gb] = at::native_batch_norm_backward(
      in_fp32(gradient), in_fp32(x), in_fp32(weight), in_fp32(running_mean), in_fp32(running_var),
      in_fp32(mean), in_fp32(rstd), training, eps, {mask[0], mask[1], mask[2]});
  if (mask[0]) dx = gx;
  if (mask[1]) dweight = gw;
  if (mask[2]) dbias = gb;
})

OP(aclnnMseLoss,
   [](In x, In target, int64_t reduction, Out o) { o = at::mse_loss(x, target, reduction); })
OP(aclnnMseLossOut,
   [](In x, In target, int64_t reduction, Out o) { o = at::mse_loss(x, target, reduction); })
OP(aclnnMseLossBackward, [](In gradient, In x, In target, int64_t reduction, Out o) {
  o = at::mse_loss_backward(gradient, x, target, reduction);
})
OP(aclnnL1Loss,
   [](In x, In target, int64_t reduction, Out o) { o = at::l1_loss(x, target, reduction); })
OP(aclnnL1LossBackward, [](In gradient, In x, In target, int64_t reduction, Out o) {
  at::Tensor result = at::mul(at::sign(at::sub(x, target)), gradient);
  o = reduced(result, x, reduction);
})
OP(aclnnSmoothL1Loss, [](In x, In target, int64_t reduction, float beta, Out o) {
  o = at::smooth_l1_loss(x, target, reduction, beta);
})
OP(aclnnSmoothL1LossBackward,
   [](In gradient, In x, In target, int64_t reduction, float beta, Out o) {
     o = at::smooth_l1_loss_backward(gradient, x, target, reduction, beta);
   })
OP(aclnnNLLLoss, [](In x, In target, OptionalIn weight, int64_t reduction, int64_t ignore, Out o,
                    OptionalOut total) {
  const auto [loss, sum] = at::nll_loss_forward(x, target.to(at::kLong), weight, reduction, ignore);
  o = loss;
  if (total && total->numel()) total = sum;
})
OP(aclnnNLLLossBackward, [](In gradient, In x, In target, OptionalIn weight, int64_t reduction,
                            int64_t ignore, In total, Out o) {
  o = at::nll_loss_backward(gradient, x, target.to(at::kLong), weight, reduction, ignore, total);
})
OP(aclnnNLLLoss2d, [](In x, In target, OptionalIn weight, int64_t reduction, int64_t ignore, Out o,
                      OptionalOut total) {
  const auto [loss, sum] =
      at::nll_loss2d_forward(x, target.to(at::kLong), weight, reduction, ignore);
  o = loss;
  if (total && total->numel()) total = sum;
})
OP(aclnnNLLLoss2dBackward, [](In gradient, In x, In target, OptionalIn weight, int64_t reduction,
                              int64_t ignore, In total, Out o) {
  o = at::nll_loss2d_backward(gradient, x, target.to(at::kLong), weight, reduction, ignore, total);
})
OP(aclnnKlDiv, [](In x, In target, int64_t reduction, bool log_target, Out o) {
  o = at::kl_div(x, target, reduction, log_target);
})
// Derivative of target * (log target - x), or of exp(target) * (target - x), by x.
OP(aclnnKlDivBackward, [](In gradient, In x, In target, int64_t reduction, bool log_target, Out o) {
  const at::Tensor result = at::mul(at::neg(log_target ? at::exp(target) : target), gradient);
  o = reduced(result, x, reduction);
})
// The same by the target.
OP(aclnnKlDivTargetBackward,
   [](In gradient, In x, In target, int64_t reduction, bool log_target, Out o) {
     const at::Tensor slope =
         log_target ? at::mul(at::exp(target), at::add(at::sub(target, x), 1))
                    : at::where(at::gt(target, 0), at::sub(at::add(at::log(target), 1), x),
                                at::zeros_like(x));
     const at::Tensor result = at::mul(slope, gradient);
     o = reduced(result, x, reduction);
   })
OP(aclnnBinaryCrossEntropy, [](In x, In target, OptionalIn weight, int64_t reduction, Out o) {
  o = at::binary_cross_entropy(x, target, weight, reduction);
})
OP(aclnnBinaryCrossEntropyBackward,
   [](In gradient, In x, In target, OptionalIn weight, int64_t reduction, Out o) {
     o = at::binary_cross_entropy_backward(gradient, x, target, weight, reduction);
   })
// Inside in fp32, rounded once to the output's dtype.
at::Tensor widened(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
}
std::optional<at::Tensor> widened(const std::optional<at::Tensor>& x) {
  return x ? std::optional(widened(*x)) : std::nullopt;
}

// d/dx of (1 - t) x + (1 + (p - 1) t) log(1 + exp(-x)), times weight.
OP(aclnnBinaryCrossEntropyWithLogitsBackward, [](In gradient, In x, In target, OptionalIn weight,
                                                 OptionalIn positive, int64_t reduction, Out o) {
  const at::Tensor wide = widened(x), t = widened(target), s = at::sigmoid(wide);
  const at::Tensor p = positive ? at::mul(*positive, t) : t;
  const at::Tensor slope = at::sub(at::mul(at::add(at::sub(p, t), 1), s), p);
  const at::Tensor result = at::mul(weight ? at::mul(slope, *weight) : slope, gradient);
  o = reduced(result, wide, reduction);
})
OP(aclnnBinaryCrossEntropyWithLogits,
   [](In x, In target, OptionalIn weight, OptionalIn positive, int64_t reduction, Out o) {
     o = at::binary_cross_entropy_with_logits(widened(x), widened(target), widened(weight),
                                              widened(positive), reduction);
   })

// One step of AdamW; decoupled weight decay. `step`, on the device, is how many were made before:
// torch_npu subtracts one from what torch counts.
OP(aclnnApplyAdamWV2,
   [](Out parameter, Out m, Out v, OptionalOut largest, In gradient, In step, float lr, float beta1,
      float beta2, float decay, float eps, bool amsgrad, bool maximize) {
     const double t = step.item<double>() + 1;
     const at::Tensor g = maximize ? at::neg(gradient) : gradient;
     m = at::lerp(*m, g, 1 - beta1);
     v = at::addcmul(at::mul(*v, beta2), g, g, 1 - beta2);
     if (amsgrad) largest = at::maximum(*largest, *v);
     const at::Tensor root = at::div(at::sqrt(amsgrad ? *largest : *v),
                                     std::sqrt(1 - std::pow(static_cast<double>(beta2), t)));
     const double rate = lr / (1 - std::pow(static_cast<double>(beta1), t));
     parameter = at::addcdiv(at::mul(*parameter, 1 - lr * decay), *m, at::add(root, eps), -rate);
   })

OP(aclnnSoftMarginLoss, [](In x, In target, int64_t reduction, Out o) {
  o = at::soft_margin_loss(x, target, reduction);
})
OP(aclnnSoftMarginLossBackward, [](In gradient, In x, In target, int64_t reduction, Out o) {
  o = at::soft_margin_loss_backward(gradient, x, target, reduction);
})
OP(aclnnMultilabelMarginLoss, [](In x, In target, int64_t reduction, Out o, Out is_target) {
  const auto [loss, chosen] =
      at::multilabel_margin_loss_forward(x, target.to(at::kLong), reduction);
  o = loss, is_target = chosen;
})
// torch_npu rounds the last axis of log_alpha up on A2 and A3.
OP(aclnnCtcLoss, [](In x, In targets, Ints lengths, Ints target_lengths, int64_t blank,
                    bool zero_infinity, Out o, Out log_alpha) {
  const auto [loss, alpha] =
      at::_ctc_loss(x, targets.to(at::kLong), lengths, target_lengths, blank, zero_infinity);
  o = loss;
  const at::Tensor batched = x.dim() == 2 ? alpha.view({1, alpha.size(-2), alpha.size(-1)}) : alpha;
  log_alpha->slice(2, 0, batched.size(2)).copy_(batched);
  log_alpha.touch();
})
OP(aclnnCtcLossBackward, [](In gradient, In x, In targets, Ints lengths, Ints target_lengths,
                            In loss, In log_alpha, int64_t blank, bool zero_infinity, Out o) {
  const int64_t longest = *std::max_element(target_lengths.begin(), target_lengths.end());
  const at::Tensor alpha = log_alpha.slice(2, 0, 2 * longest + 1).contiguous();
  o = at::_ctc_loss_backward(gradient, x, targets.to(at::kLong), lengths, target_lengths, loss,
                             alpha, blank, zero_infinity);
})

}  // namespace softnpu
