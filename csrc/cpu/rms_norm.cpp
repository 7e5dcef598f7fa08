#include "rms_norm.h"

#include "parallel_rows.h"

#define DSV4_ROWS "cpu/rms_norm_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {

void rms_norm(const RmsNorm& call, Isa isa) {
  if (call.x_rows.width() > 0) {
    parallel_rows(call, call.x_rows.count(), call.x_rows.width(), DSV4_FOR_ISA(isa, rms_norm_rows));
  }
}

}  // namespace dsv4::cpu
