#include "config.h"

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <string_view>

#include "number.h"

namespace softnpu {
namespace {

constexpr size_t kMostMemory = size_t{256} << 30;

bool starts(const std::string& name, const char* prefix) { return name.rfind(prefix, 0) == 0; }

size_t default_memory() {
  const size_t physical =
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t hbm = size_t{64} << 30;
  return physical / 2 < hbm ? physical / 2 : hbm;
}

// "64M", "2GiB", "1.5g", "1048576"
bool bytes(const std::string& size, size_t* value) {
  const size_t digits = std::min(size.find_first_not_of("0123456789."), size.size());
  double count = 0;
  if (!number(size.substr(0, digits), &count)) return false;
  const std::string unit = size.substr(digits);
  const size_t power =
      unit.empty() ? 0 : std::string_view("kmg").find(static_cast<char>(std::tolower(unit[0]))) + 1;
  if (!unit.empty() && power == 0) return false;  // npos + 1
  const std::string rest = unit.empty() ? "" : unit.substr(1);
  if (!rest.empty() && rest != "B" && rest != "iB") return false;
  const double total = count * static_cast<double>(size_t{1} << (10 * power));
  if (total < 1 || total > static_cast<double>(kMostMemory)) return false;
  *value = static_cast<size_t>(total);
  return true;
}

// "8.5.0", "8.3.RC1", "9.1"
bool is_version(const std::string& text) {
  const size_t dot = text.find('.'), second = std::min(text.find('.', dot + 1), text.size());
  int part = 0;
  if (dot == std::string::npos || text[0] == '-' || text[dot + 1] == '-' || text.size() > 60)
    return false;
  if (!number(text.substr(0, dot), &part) || !number(text.substr(dot + 1, second - dot - 1), &part))
    return false;
  const auto word = [](unsigned char c) { return std::isalnum(c) || c == '.'; };
  return std::isalnum(static_cast<unsigned char>(text.back())) &&
         std::all_of(text.begin(), text.end(), word);
}

bool emulated(const std::string& soc) {
  return starts(soc, "Ascend910B") || starts(soc, "Ascend910_93") || starts(soc, "Ascend950");
}

struct Setting {
  const char *name, *expected;
  bool (*take)(Config& into, const std::string& value);
};

constexpr Setting kSettings[] = {
    {"SOC", "Ascend910B*, Ascend910_93* or Ascend950*",
     [](Config& into, const std::string& value) { return into.soc = value, emulated(value); }},
    {"CANN", "a version such as 8.5.0 or 8.3.RC1",
     [](Config& into, const std::string& value) { return into.cann = value, is_version(value); }},
    {"DEVICES", "1 to 32",
     [](Config& into, const std::string& value) {
       return number(value, &into.devices) && into.devices >= 1 && into.devices <= 32;
     }},
    {"MEMORY", "a size such as 64M or 2G, 1 byte to 256G",
     [](Config& into, const std::string& value) { return bytes(value, &into.memory); }},
    {"WORKSPACE", "a size such as 4K, 1 byte to 256G",
     [](Config& into, const std::string& value) { return bytes(value, &into.workspace); }},
    {"CHAOS", "a seed, 0 to 2^64 - 1",
     [](Config& into, const std::string& value) { return number(value, &into.chaos); }},
    {"TRACE", "a file",
     [](Config& into, const std::string& value) { return into.trace = value, true; }},
};

Config read() {
  Config result;
  result.memory = default_memory();
  for (const Setting& setting : kSettings) {
    const std::string name = std::string("SOFTNPU_") + setting.name;
    const char* const value = std::getenv(name.c_str());
    if (!value || !*value) continue;
    Config changed = result;
    if (setting.take(changed, value))
      result = changed;
    else if (result.problem.empty())
      result.problem = name + "=" + value + ": expected " + setting.expected;
  }
  return result;
}

}  // namespace

std::string expected_instead(const std::string& name, const std::string& value) {
  Config ignored;
  for (const Setting& setting : kSettings)
    if (name == setting.name && !setting.take(ignored, value)) return setting.expected;
  return "";
}

const Config& config() {
  static const Config* const settings = new Config(read());
  return *settings;
}

Generation generation() {
  if (starts(config().soc, "Ascend950")) return Generation::kA5;
  return starts(config().soc, "Ascend910_93") ? Generation::kA3 : Generation::kA2;
}

}  // namespace softnpu
