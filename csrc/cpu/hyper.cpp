#include "hyper.h"

#include "parallel_rows.h"

#define DSV4_ROWS "cpu/hyper_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {

void hyper_mix(const HyperMix& call, Isa isa) {
  const int64_t rows = call.comb == nullptr ? call.streams : call.streams * (call.streams + 2);
  const int64_t elements = call.streams * call.x_rows.width();
  parallel_rows(call, call.x_rows.count() / call.streams, rows * elements,
                DSV4_FOR_ISA(isa, mix_rows));
}

void hyper_post(const HyperPost& call, Isa isa) {
  parallel_rows(call, call.z_rows.count(), call.streams * call.x_rows.width(),
                DSV4_FOR_ISA(isa, post_rows));
}

}  // namespace dsv4::cpu
