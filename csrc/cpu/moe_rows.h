// Tokens of expert combination, over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

template <class Y>
void combine_typed(const dsv4::cpu::MoeCombine& call, int64_t begin, int64_t end) {
  const int64_t width = call.y_rows.width();
  for (int64_t token = begin; token < end; ++token) {
    float* sum = call.sums + token * width;
    for (int64_t j = 0; j < call.k; ++j) {
      const int64_t row = call.row_of[token * call.k + j];
      const Y* y = static_cast<const Y*>(call.y) + call.y_rows.offset(row);
      for (int64_t i = 0; i < width; i += Vec::lanes) {
        const Vec value = load_first(y + i, width - i);
        store_first(j == 0 ? value : load_first(sum + i, width - i) + value, sum + i, width - i);
      }
    }
  }
}

void combine_rows(const dsv4::cpu::MoeCombine& call, int64_t begin, int64_t end) {
  DSV4_FOR_DTYPE(call.dtype, combine_typed, call, begin, end);
}
