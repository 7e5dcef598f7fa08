#include "common/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace dsv4 {
namespace {

std::vector<Isa> probe() {
  std::vector<Isa> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // F16C comes with every AVX2; older compilers do not know its name here.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    found.push_back(Isa::avx512);
  }
  if (avx2) {
    found.push_back(Isa::avx2);
  }
#endif
  found.push_back(Isa::portable);
  return found;
}

Isa chosen() {
  const char* name = std::getenv("DSV4_ISA");
  return name == nullptr || *name == '\0' ? available_isas().front() : parse_isa(name);
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> value{chosen()};
  return value;
}

}  // namespace

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = probe();
  return isas;
}

Isa isa() { return active().load(std::memory_order_relaxed); }
void set_isa(Isa value) { active().store(value, std::memory_order_relaxed); }

const char* isa_name(Isa value) {
  switch (value) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa parse_isa(std::string_view name) {
  const auto& isas = available_isas();
  const auto found =
      std::find_if(isas.begin(), isas.end(), [&](Isa value) { return name == isa_name(value); });
  if (found != isas.end()) {
    return *found;
  }
  std::string names;
  for (const Isa value : isas) {
    names += std::string(names.empty() ? "" : ", ") + isa_name(value);
  }
  throw std::invalid_argument("ISA '" + std::string(name) +
                              "' is not one that this machine runs: " + names);
}

}  // namespace dsv4
