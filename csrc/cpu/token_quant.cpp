#include "token_quant.h"

#include "parallel_rows.h"
#include "scratch.h"

#define DSV4_ROWS "cpu/token_quant_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {

void token_quant(const TokenQuant& call, Isa isa) {
  parallel_rows(call, call.x_rows.count(), call.x_rows.width(),
                DSV4_FOR_ISA(isa, token_quant_rows));
}

}  // namespace dsv4::cpu
