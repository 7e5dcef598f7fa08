// Includes DSV4_ROWS once per instruction set, inside dsv4::cpu::<isa> and over that set's vector
// type `Vec`:
//
//   #define DSV4_ROWS "cpu/rms_norm_rows.h"
//   #include "cpu/foreach_isa.h"
//   DSV4_FOR_ISA(isa, rms_norm_rows)(call, begin, end);
//
// Functions of a rows header may use the instructions, so it must not make functions that other
// files share (no standard library templates, only builtins). Include everything else before.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

// Before a loop of a small constant number of rounds whose vectors must stay in registers.
#if defined(__clang__)
#define DSV4_UNROLL _Pragma("unroll")
#else
#define DSV4_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored \
    "-Wuninitialized"  // gcc bug 105593: its own headers' "undefined" operands
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
namespace dsv4::cpu::avx512 {
namespace {
#include "cpu/vec_avx512.h"
// Each after what it uses.
#include "cpu/vec_math.h"
// Both over these.
#include "cpu/vec_dot.h"
#include "cpu/vec_quant.h"
// The rows after their vector type.
#include DSV4_ROWS
}  // namespace
}  // namespace dsv4::cpu::avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace dsv4::cpu::avx2 {
namespace {
#include "cpu/vec_avx2.h"
// Each after what it uses.
#include "cpu/vec_math.h"
// Both over these.
#include "cpu/vec_dot.h"
#include "cpu/vec_quant.h"
// The rows after their vector type.
#include DSV4_ROWS
}  // namespace
}  // namespace dsv4::cpu::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
#endif  // __x86_64__

namespace dsv4::cpu::portable {
namespace {
#include "cpu/vec_portable.h"
// Each after what it uses.
#include "cpu/vec_math.h"
// Both over these.
#include "cpu/vec_dot.h"
#include "cpu/vec_quant.h"
// The rows after their vector type.
#include DSV4_ROWS
}  // namespace
}  // namespace dsv4::cpu::portable

#if defined(__x86_64__)
#define DSV4_FOR_ISA(isa, function)                                                          \
  ((isa) == ::dsv4::Isa::avx512 ? &::dsv4::cpu::avx512::function                             \
                                : ((isa) == ::dsv4::Isa::avx2 ? &::dsv4::cpu::avx2::function \
                                                              : &::dsv4::cpu::portable::function))
#else
#define DSV4_FOR_ISA(isa, function) (static_cast<void>(isa), &::dsv4::cpu::portable::function)
#endif
