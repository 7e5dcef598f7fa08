// Tokens of experts summed with their weights, over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

constexpr int64_t kSumBlock = 256;  // channels whose products wait on the stack

// Apart from the sums, so that no compiler fuses both: each product is rounded.
[[gnu::noinline]] void weigh(const dsv4::BFloat16* y, float weight, int64_t width, float* to) {
  const Vec factor = Vec::broadcast(weight);
  for (int64_t i = 0; i < width; i += Vec::lanes) {
    (load_first(y + i, width - i) * factor).store(to + i);
  }
}

[[gnu::noinline]] void add(const float* from, int64_t width, float* to) {
  for (int64_t i = 0; i < width; i += Vec::lanes) {
    (Vec::load(to + i) + Vec::load(from + i)).store(to + i);
  }
}

void add_choices(const dsv4::cpu::ChoiceSum& call, int64_t begin, int64_t end) {
  alignas(64) float sum[kSumBlock], product[kSumBlock];
  const int64_t channels = call.channels, choices = call.choices;
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t from = 0; from < channels; from += kSumBlock) {
      const int64_t width = channels - from < kSumBlock ? channels - from : kSumBlock;
      dsv4::BFloat16* y = call.y + token * channels + from;
      for (int64_t i = 0; i < width; i += Vec::lanes) {
        load_first(y + i, width - i).store(sum + i);
      }
      for (int64_t j = 0; j < choices; ++j) {
        const int64_t row = call.row_of[token * choices + j];
        weigh(call.routed + row * channels + from,
              call.weights[token * call.weights_strides[0] + j * call.weights_strides[1]], width,
              product);
        add(product, width, sum);
      }
      for (int64_t i = 0; i < width; i += Vec::lanes) {
        store_first(Vec::load(sum + i), y + i, width - i);
      }
    }
  }
}
