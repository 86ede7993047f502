// The kernel of observe_tokens.h, written once over an instruction set `Isa` (isa_*.h).
#pragma once

#include "observe_tokens.h"
#include "vector_math.h"

namespace tamis {

template <class Isa>
void softmax_row(float* scores, int64_t width, int64_t begin, int64_t end, float factor) {
  using Vec = typename Isa::Vec;
  using Math = VectorMath<Isa>;
  constexpr int64_t kWidth = Isa::kWidth;
  constexpr float kNothing = -__builtin_inff();
  for (int64_t i = 0; i < (begin < width ? begin : width); ++i) scores[i] = 0.0f;
  for (int64_t i = end > begin ? end : begin; i < width; ++i) scores[i] = 0.0f;
  if (begin >= end) return;
  const int64_t whole = begin + (end - begin) / kWidth * kWidth;
  float tail[kWidth];  // what is left at the end, filled up with what weighs nothing
  for (int64_t i = 0; i < kWidth; ++i) tail[i] = whole + i < end ? scores[whole + i] : kNothing;

  Vec tops = Isa::load(tail);
  for (int64_t i = begin; i < whole; i += kWidth) tops = Isa::max(tops, Isa::load(scores + i));
  const float top = Isa::max_lane(tops);
  const Vec origin = Isa::set(top == kNothing ? 0.0f : top), by = Isa::set(factor);
  Vec total = Math::exp((Isa::load(tail) - origin) * by);
  Isa::store(tail, total);
  for (int64_t i = begin; i < whole; i += kWidth) {
    const Vec weight = Math::exp((Isa::load(scores + i) - origin) * by);
    Isa::store(scores + i, weight);
    total = total + weight;
  }
  const float sum = Isa::sum_lanes(total);
  const Vec share = Isa::set(sum == 0.0f ? 0.0f : 1.0f / sum);
  for (int64_t i = begin; i < whole; i += kWidth) {
    Isa::store(scores + i, Isa::load(scores + i) * share);
  }
  Isa::store(tail, Isa::load(tail) * share);
  for (int64_t i = whole; i < end; ++i) scores[i] = tail[i - whole];
}

}  // namespace tamis
