#if defined(__x86_64__)
#include "rms_norm.h"
#include "vec_avx2.h"
// After the vector type that it is written over.
#include "rms_norm_rows.h"

void dsv4::cpu::rms_norm_avx2(const RmsNorm& call, int64_t begin, int64_t end) { with_types(call, begin, end); }

#include "vec_end.h"
#endif
