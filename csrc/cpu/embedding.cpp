#include "embedding.h"

#include <cstring>

#include "parallel_rows.h"

namespace dsv4::cpu {
namespace {

void copy_tokens(const EmbedStreams& call, int64_t begin, int64_t end) {
  char* to = call.streams + begin * call.copies * call.row_bytes;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t row = call.ids.at(token * call.ids_stride, call.weight_rows);
    const char* from = call.weight + row * call.weight_stride_bytes;
    for (int64_t copy = 0; copy < call.copies; ++copy, to += call.row_bytes) {
      std::memcpy(to, from, static_cast<size_t>(call.row_bytes));
    }
  }
}

}  // namespace

void embed_streams(const EmbedStreams& call) {
  if (call.row_bytes > 0 && call.weight_rows > 0) {
    parallel_rows(call, call.tokens, call.copies * call.row_bytes, copy_tokens);
  }
}

}  // namespace dsv4::cpu
