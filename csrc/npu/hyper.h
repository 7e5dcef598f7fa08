// aclnn functions of hyper-connections (spec/ascend-operators.md 4.2).
#pragma once

#include "function.h"

namespace dsv4::npu {

inline constexpr std::array kMhcVersions = {Version{Package::builtin, kA5, {9, 0}}};

struct MhcPre {  // streams x [.., n, D] -> h_in, h_post, and h_res before Sinkhorn; exact fp32
                 // products
  static constexpr const char* symbol = "aclnnMhcPre";
  static constexpr std::array versions = kMhcVersions;
  In x, phi, alpha, bias;
  OptionalIn gamma;
  Real norm_eps, hc_eps;
  Out h_in, h_post, h_res;
  OptionalOut inv_rms, h_mix, h_pre;
  DSV4_ARGUMENTS(x, phi, alpha, bias, gamma, norm_eps, hc_eps, h_in, h_post, h_res, inv_rms, h_mix,
                 h_pre)
};

struct MhcSinkhorn {  // [.., n, n] logits -> doubly stochastic
  static constexpr const char* symbol = "aclnnMhcSinkhorn";
  static constexpr std::array versions = kMhcVersions;
  In x;
  Single eps;
  Int num_iters;
  Out output;
  OptionalOut norm_out, sum_out;
  DSV4_ARGUMENTS(x, eps, num_iters, output, norm_out, sum_out)
};

struct MhcPost {  // out[k] = h_post[k] * h_out + sum_j h_res[j, k] * x[j]
  static constexpr const char* symbol = "aclnnMhcPost";
  static constexpr std::array versions = {Version{Package::builtin, kA5, {9, 0}},
                                          Version{Package::builtin, kA2 | kA3, {9, 1}}};
  In x;
  OptionalIn h_res;
  In h_out, h_post;
  Out out;
  DSV4_ARGUMENTS(x, h_res, h_out, h_post, out)
};

struct MhcPreSinkhorn {  // all of hc_pre; phi is cut to HF32, 10 explicit mantissa bits
  static constexpr const char* symbol = "aclnnMhcPreSinkhorn";
  static constexpr std::array versions = {Version{Package::builtin, kAllChips, {9, 1}}};
  static constexpr int64_t kStreams = 4;
  static constexpr int64_t kRounds = 20;
  In x, phi, alpha, bias;
  Int hc_mult, num_iters;
  Real hc_eps, norm_eps;
  Flag need_backward;
  Out hin, h_post, h_res;
  OptionalOut h_pre, hc_before_norm, inv_rms, sum_out, norm_out;
  DSV4_ARGUMENTS(x, phi, alpha, bias, hc_mult, num_iters, hc_eps, norm_eps, need_backward, hin,
                 h_post, h_res, h_pre, hc_before_norm, inv_rms, sum_out, norm_out)
};

}  // namespace dsv4::npu
