#include "int8_swiglu.h"

#include <algorithm>

#include "cpu/expert_rows.h"
#include "cpu/parallel_rows.h"
#include "cpu/scratch.h"

#define DSV4_ROWS "cpu/int8_swiglu_rows.h"
#include "cpu/foreach_isa.h"

namespace dsv4::cpu {
namespace {

constexpr int64_t kExponential = 8;  // what an element costs more than one that is only read

void clear(const Int8SwigluQuant& call, int64_t begin, int64_t end) {
  std::fill(call.codes + begin * call.width, call.codes + end * call.width, int8_t{0});
  std::fill(call.scales + begin, call.scales + end, 0.0f);
}

}  // namespace

void int8_swiglu_quant(const Int8SwigluQuant& call, Isa isa) {
  const std::vector<ExpertRows>& experts =
      rows_by_expert(call.offsets, call.experts, call.rows,
                     [&](int64_t begin, int64_t end) { clear(call, begin, end); });
  const auto run = DSV4_FOR_ISA(isa, int8_swiglu_rows);
  const int64_t grain = grain_of(kElementsPerThread, kExponential * call.width);
  parallel_for(call.rows, grain, [&](int64_t begin, int64_t end) {
    for (const ExpertRows& of : experts) {
      const int64_t low = std::max(begin, of.begin), high = std::min(end, of.end);
      if (low < high) {
        run(call, of.expert, low, high);
      }
    }
  });
}

}  // namespace dsv4::cpu
