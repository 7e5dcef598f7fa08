// Token embedding into residual streams (spec/v4.md 2.1).
#pragma once

#include "common/indices.h"

namespace dsv4::cpu {

// Row ids[t] of the weight, of `row_bytes` adjacent bytes, `copies` times: contiguous [T, copies].
struct EmbedStreams {
  Indices ids;
  int64_t ids_stride;
  int64_t tokens;
  const char* weight;
  int64_t weight_rows;
  int64_t weight_stride_bytes;
  int64_t row_bytes;
  int64_t copies;
  char* streams;
};

void embed_streams(const EmbedStreams& call);

}  // namespace dsv4::cpu
