#include "hyper.h"

#include <bit>
#include <cmath>

#include "parallel_rows.h"
#include "thread_buffer.h"

#define DSV4_ROWS "cpu/hyper_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
namespace {

float cut_to_hf32(float value) {
  const uint32_t cut = std::bit_cast<uint32_t>(value) & ~uint32_t{0x1fff};
  return std::isnan(value) ? value : std::bit_cast<float>(cut);
}

}  // namespace

void hyper_mix(const HyperMix& given, Isa isa) {
  HyperMix call = given;
  const int64_t rows = call.comb == nullptr ? call.streams : call.streams * (call.streams + 2);
  const int64_t elements = call.streams * call.x_rows.width();
  if (call.hf32) {
    thread_local ThreadBuffer cut_of_thread;
    auto* cut = cut_of_thread.of<float>(rows * elements);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < elements; ++i) {
        cut[row * elements + i] = cut_to_hf32(given.fn[row * given.fn_stride + i]);
      }
    }
    call.fn = cut;
    call.fn_stride = elements;
  }
  parallel_rows(call, call.x_rows.count() / call.streams, rows * elements,
                DSV4_FOR_ISA(isa, mix_rows));
}

void hyper_post(const HyperPost& call, Isa isa) {
  parallel_rows(call, call.z_rows.count(), call.streams * call.x_rows.width(),
                DSV4_FOR_ISA(isa, post_rows));
}

}  // namespace dsv4::cpu
