#include "hadamard.h"

#include "parallel_rows.h"
#include "scratch.h"

#define DSV4_ROWS "cpu/hadamard_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {

void hadamard(const Hadamard& call, Isa isa) {
  parallel_rows(call, call.x_rows.count(), 4 * call.x_rows.width(),
                DSV4_FOR_ISA(isa, hadamard_rows));
}

}  // namespace dsv4::cpu
