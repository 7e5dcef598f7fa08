#include "rms_norm.h"
#include "vec_portable.h"
// After the vector type that it is written over.
#include "rms_norm_rows.h"

void dsv4::cpu::rms_norm_portable(const RmsNorm& call, int64_t begin, int64_t end) { with_types(call, begin, end); }
