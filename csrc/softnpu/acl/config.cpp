#include "config.h"

#include <unistd.h>

#include <cstdlib>

namespace softnpu {
namespace {

std::string text(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

bool starts(const std::string& name, const char* prefix) { return name.rfind(prefix, 0) == 0; }

size_t default_memory() {
  const size_t physical = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t hbm = size_t{64} << 30;
  return physical / 2 < hbm ? physical / 2 : hbm;
}

// "64M", "2GiB", "1048576"
size_t bytes(const std::string& size, std::string* problem) {
  char* end = nullptr;
  const double number = std::strtod(size.c_str(), &end);
  size_t unit = 1;
  if (*end == 'K' || *end == 'k')
    unit = size_t{1} << 10;
  else if (*end == 'M' || *end == 'm')
    unit = size_t{1} << 20;
  else if (*end == 'G' || *end == 'g')
    unit = size_t{1} << 30;
  else if (*end != 0)
    *problem = "SOFTNPU_MEMORY=" + size + " is not a size such as 64M or 2G";
  if (number <= 0) *problem = "SOFTNPU_MEMORY=" + size + " is not a positive size";
  return static_cast<size_t>(number * static_cast<double>(unit));
}

Config read() {
  Config result;
  result.soc = text("SOFTNPU_SOC", "Ascend910B3");
  result.cann = text("SOFTNPU_CANN", "8.5.0");
  result.trace = text("SOFTNPU_TRACE", "");
  result.devices = std::atoi(text("SOFTNPU_DEVICES", "8").c_str());
  const std::string memory = text("SOFTNPU_MEMORY", "");
  result.memory = memory.empty() ? default_memory() : bytes(memory, &result.problem);
  if (result.devices < 1 || result.devices > 32) result.problem = "SOFTNPU_DEVICES must be 1..32";
  if (!starts(result.soc, "Ascend910B") && !starts(result.soc, "Ascend910_93") && !starts(result.soc, "Ascend950"))
    result.problem = "SOFTNPU_SOC=" + result.soc + " is not emulated: Ascend910B*, Ascend910_93*, Ascend950*";
  return result;
}

}  // namespace

const Config& config() {
  static const Config* const settings = new Config(read());
  return *settings;
}

Generation generation() {
  if (starts(config().soc, "Ascend950")) return Generation::kA5;
  return starts(config().soc, "Ascend910_93") ? Generation::kA3 : Generation::kA2;
}

}  // namespace softnpu
