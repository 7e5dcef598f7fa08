#include "swiglu.h"

#include "parallel_rows.h"

#define DSV4_ROWS "cpu/swiglu_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {

constexpr int64_t kExponential = 8;  // what an element costs more than one that is only read

void swiglu(const Swiglu& call, Isa isa) {
  parallel_rows(call, call.gate_rows.count(), kExponential * call.gate_rows.width(),
                DSV4_FOR_ISA(isa, swiglu_rows));
}

void swiglu_quant(const SwigluQuant& call, Isa isa) {
  const RowLayout& rows = call.product.gate_rows;
  parallel_rows(call, rows.count(), kExponential * rows.width(),
                DSV4_FOR_ISA(isa, swiglu_quant_rows));
}

}  // namespace dsv4::cpu
