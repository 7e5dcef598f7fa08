// Rotary embeddings as a step of a launcher.
#pragma once

#include "npu/rope.h"
#include "npu_call.h"

namespace dsv4::bind {

constexpr int64_t kWidestRotated = 1024;

// What rows at positions are turned by: fp32 [rows, 1, 1, 2F] each, every value twice.
struct Rotation {
  at::Tensor cos, sin;

  // fp32 [rows, 2F] each.
  Rotation(const at::Tensor& cos_rows, const at::Tensor& sin_rows)
      : cos(one_each(cos_rows.contiguous())), sin(one_each(sin_rows.contiguous())) {}

  Rotation(const at::Tensor& positions, const at::Tensor& inv_freq, bool inverse) {
    const at::Tensor angles = positions.to(at::kFloat).unsqueeze(-1).mul(inv_freq);
    cos = for_pairs(angles.cos());
    sin = for_pairs(inverse ? angles.sin().neg() : angles.sin());
  }

 private:
  static at::Tensor for_pairs(const at::Tensor& values) {
    return one_each(values.repeat_interleave(2, -1));
  }

  static at::Tensor one_each(const at::Tensor& rows) {
    return rows.view({rows.size(0), 1, 1, rows.size(1)});
  }
};

// Turns the last channels of x [rows, ..., D], contiguous, in place.
inline void rotate(const NpuCall& call, const at::Tensor& x, const Rotation& by) {
  const int64_t width = x.size(-1);
  const at::Tensor rows = x.view({x.size(0), 1, -1, width});
  call.launch(npu::InplacePartialRotaryMul{call.out(rows),
                                           call.in(by.cos),
                                           call.in(by.sin),
                                           npu::InplacePartialRotaryMul::kInterleaved,
                                           {{width - by.cos.size(-1), width}}});
}

}  // namespace dsv4::bind
