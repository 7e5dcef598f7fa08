// Offers scores to BestEntries.
// Included by rows headers inside a namespace after a `Vec`, so it includes nothing and has no
// guard.

constexpr int kOffered = 4 * Vec::lanes;  // scores that are compared at a time

// Whether any lane of a is above b's.
inline bool any_above(Vec a, Vec b) {
  typedef float Floats __attribute__((vector_size(sizeof(Vec))));
  typedef int32_t Bits __attribute__((vector_size(sizeof(Vec))));
  const Bits above = __builtin_bit_cast(Floats, a) > __builtin_bit_cast(Floats, b);
  return __builtin_bit_cast(Vec, above & 0x3f800000).sum() != 0;  // 1 of each that is
}

template <class X>
void append(dsv4::cpu::BestEntries& best, const X* scores, int64_t count, int64_t first) {
  for (int64_t i = 0; i < count; ++i) {
    best.entries[best.count + i] = dsv4::cpu::ranked(dsv4::to_float(scores[i]), first + i);
  }
  best.count += count;
}

template <class X>
void append_above(dsv4::cpu::BestEntries& best, const X* scores, int64_t count, int64_t first) {
  const float threshold = best.threshold;
  uint64_t* to = best.entries + best.count;
  for (int64_t i = 0; i < count; ++i) {
    const float score = dsv4::to_float(scores[i]);
    *to = dsv4::cpu::ranked(score, first + i);
    to += score > threshold;
  }
  best.count = to - best.entries;
}

// Scores of the entries first .. first + count - 1, which come after all that were offered.
template <class X>
void offer(dsv4::cpu::BestEntries& best, const X* scores, int64_t count, int64_t first) {
  int64_t i = 0;
  while (i < count && !best.bounded) {
    const int64_t room = best.capacity - best.count;
    const int64_t some = count - i < room ? count - i : room;
    append(best, scores + i, some, first + i);
    i += some;
    if (best.count == best.capacity) best.keep();
  }
  for (; i < count; i += kOffered) {
    const int64_t some = count - i < kOffered ? count - i : kOffered;
    if (some == kOffered) {
      const X* at = scores + i;
      const Vec low = max(Vec::load(at), Vec::load(at + Vec::lanes));
      const Vec high = max(Vec::load(at + 2 * Vec::lanes), Vec::load(at + 3 * Vec::lanes));
      if (!any_above(max(low, high), Vec::broadcast(best.threshold))) {
        continue;
      }
    }
    // One more is written than counted.
    if (best.count + some >= best.capacity) best.keep();
    for (int64_t at = i; at < i + some; at += Vec::lanes) {
      const int64_t part = i + some - at < Vec::lanes ? i + some - at : Vec::lanes;
      if (part < Vec::lanes || any_above(Vec::load(scores + at), Vec::broadcast(best.threshold))) {
        append_above(best, scores + at, part, first + at);
      }
    }
  }
}
