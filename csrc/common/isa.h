// Which instruction set the CPU kernels use: the best that the machine has, or what the environment
// names in DSV4_ISA. Tests force every one in turn.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace dsv4 {

enum class Isa { portable, avx2, avx512 };  // avx512: F, BW, DQ, VL and VNNI

// Those that this machine runs, best first. Portable is always the last.
const std::vector<Isa>& available_isas();

Isa isa();                // std::invalid_argument if DSV4_ISA names none of them
void set_isa(Isa value);  // of the whole process

const char* isa_name(Isa value);
Isa parse_isa(
    std::string_view name);  // std::invalid_argument unless it is the name of an available one

}  // namespace dsv4
