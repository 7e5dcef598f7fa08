#include "types.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "softnpu/acl/report.h"

namespace softnpu::hccl {
namespace {

enum Chips : unsigned {
  kNone = 0,
  kA2 = 1,
  kA3 = 2,
  kA5 = 4,
  kLater = kA3 | kA5,
  kAll = kA2 | kA3 | kA5
};

struct Row {
  int type;
  const char* name;
  size_t bytes;
  unsigned reduced, multiplied;      // by which chips: sum, max and min; prod
  unsigned reduced_v, multiplied_v;  // by HcclReduceScatterV
};

// Pages of HcclAllReduce, HcclReduce and HcclReduceScatter, "dataType" and "op": CANN 8.5.0
// and 9.1.0 agree on A2 and A3; HcclReduceScatterV of 9.1.0. Our reading for prod on A5: 9.1.0's
// pages exclude int16 and bfp16 only, 9.0.0's page of HcclReduceScatter names no prod, hcomm's
// source lets int64, uint64 and fp64 through. Refused is what all of them refuse.
constexpr Row kTypes[] = {
    {kHcclInt8, "int8", 1, kAll, kAll, kAll, kA5},
    {kHcclInt16, "int16", 2, kAll, kNone, kAll, kNone},
    {kHcclInt32, "int32", 4, kAll, kAll, kAll, kA5},
    {kHcclFp16, "fp16", 2, kAll, kAll, kAll, kA5},
    {kHcclFp32, "fp32", 4, kAll, kAll, kAll, kA5},
    {kHcclInt64, "int64", 8, kAll, kAll, kLater, kA5},
    {kHcclUint64, "uint64", 8, kA5, kA5, kNone, kNone},
    {kHcclUint8, "uint8", 1, kNone, kNone, kNone, kNone},
    {kHcclUint16, "uint16", 2, kNone, kNone, kNone, kNone},
    {kHcclUint32, "uint32", 4, kNone, kNone, kNone, kNone},
    {kHcclFp64, "fp64", 8, kA5, kA5, kNone, kNone},
    {kHcclBfp16, "bfp16", 2, kAll, kNone, kAll, kNone},
    {kHcclHif8, "hif8", 1, kNone, kNone, kNone, kNone},
    {kHcclFp8E4M3, "fp8e4m3", 1, kNone, kNone, kNone, kNone},
    {kHcclFp8E5M2, "fp8e5m2", 1, kNone, kNone, kNone, kNone},
    {kHcclFp8E8M0, "fp8e8m0", 1, kNone, kNone, kNone, kNone},
};
constexpr const char* kOperations[] = {"sum", "prod", "max", "min"};

const Row& row(int dtype) {
  const auto found = std::find_if(std::begin(kTypes), std::end(kTypes),
                                  [&](const Row& r) { return r.type == dtype; });
  if (found == std::end(kTypes))
    throw Fault(kParameter,
                "softnpu: HCCL data type " + std::to_string(dtype) + " is not emulated");
  return *found;
}

bool reduces(const Row& row, int operation, bool uneven, Generation chip) {
  constexpr unsigned kChips[] = {kA2, kA3, kA5};
  const unsigned sums = uneven ? row.reduced_v : row.reduced,
                 products = uneven ? row.multiplied_v : row.multiplied;
  return (operation == kHcclProd ? products : sums) & kChips[static_cast<int>(chip)];
}

}  // namespace

size_t element_size(int dtype) { return row(dtype).bytes; }

void check_reduction(int dtype, int operation, Generation chip, bool uneven) {
  if (operation < kHcclSum || operation > kHcclMin)
    throw Fault(kParameter,
                "softnpu: reduction " + std::to_string(operation) + ", expected 0 to 3");
  if (reduces(row(dtype), operation, uneven, chip)) return;
  std::string expected;
  for (const Row& other : kTypes)
    if (reduces(other, operation, uneven, chip))
      expected += std::string(expected.empty() ? "" : ", ") + other.name;
  throw Fault(kFeature, std::string("softnpu: reduction ") + kOperations[operation] + " of " +
                            row(dtype).name + ": this chip's HCCL reduces " +
                            (expected.empty() ? "nothing so" : expected));
}

}  // namespace softnpu::hccl
