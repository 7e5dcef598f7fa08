#include "quant.h"

#include "parallel_rows.h"

#define DSV4_ROWS "cpu/quant_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {

void quantise(const Quantise& call, Isa isa) {
  parallel_rows(call, call.x_rows.count(), call.x_rows.width(), DSV4_FOR_ISA(isa, quantise_rows));
}

void round_trip(const RoundTrip& call, Isa isa) {
  parallel_rows(call, call.x_rows.count(), call.x_rows.width(), DSV4_FOR_ISA(isa, round_trip_rows));
}

}  // namespace dsv4::cpu
