// Rows of sampling, over the vector type `Vec` of the including file.
// Included by foreach_isa.h inside a namespace, so it includes nothing and has no guard.

inline float largest_lane(Vec value) {
  float lane[Vec::lanes];
  value.store(lane);
  float largest = lane[0];
  for (const float other : lane) {
    largest = other > largest ? other : largest;
  }
  return largest;
}

// `count` is at least 1.
inline float largest_of(const float* x, int64_t count) {
  Vec most = Vec::broadcast(x[0]);
  int64_t i = 0;
  for (; i + Vec::lanes <= count; i += Vec::lanes) {
    most = max(most, Vec::load(x + i));
  }
  float largest = largest_lane(most);
  for (; i < count; ++i) {
    largest = x[i] > largest ? x[i] : largest;
  }
  return largest;
}

// The first of the largest.
inline int64_t argmax(const float* x, int64_t count) {
  const float largest = largest_of(x, count);
  for (int64_t i = 0; i < count; ++i) {
    if (x[i] == largest) {
      return i;
    }
  }
  return 0;
}

inline void softmax(const float* x, int64_t count, float temperature, float* probabilities) {
  const Vec divisor = Vec::broadcast(temperature);
  const Vec most = Vec::broadcast(largest_of(x, count)) / divisor;
  Vec sum = Vec::broadcast(0);
  int64_t i = 0;
  for (; i + Vec::lanes <= count; i += Vec::lanes) {
    const Vec power = exp(Vec::load(x + i) / divisor - most);
    sum = sum + power;
    power.store(probabilities + i);
  }
  const int64_t rest = count - i;
  store_first(exp(load_first(x + i, rest) / divisor - most), probabilities + i, rest);
  sum = sum + load_first(probabilities + i, rest);
  const Vec total = Vec::broadcast(sum.sum());
  for (i = 0; i < count; i += Vec::lanes) {
    store_first(load_first(probabilities + i, count - i) / total, probabilities + i, count - i);
  }
}

void sample_rows(const dsv4::cpu::Sample& call, int64_t begin, int64_t end) {
  const int64_t count = call.logits_rows.width();
  for (int64_t row = begin; row < end; ++row) {
    const float* logits = call.logits + call.logits_rows.offset(row);
    if (call.temperature == 0) {
      call.ids[row] = argmax(logits, count);
      continue;
    }
    auto* p = static_cast<float*>(dsv4::cpu::scratch(static_cast<size_t>(count) * sizeof(float)));
    softmax(logits, count, call.temperature, p);
    const float* noise = call.noise + call.noise_rows.offset(row);
    if (call.top_p < 1) {
      call.ids[row] = dsv4::cpu::best_in_nucleus(p, noise, count, call.top_p);
      continue;
    }
    for (int64_t i = 0; i < count; i += Vec::lanes) {
      store_first(load_first(p + i, count - i) / load_first(noise + i, count - i), p + i,
                  count - i);
    }
    call.ids[row] = argmax(p, count);
  }
}
