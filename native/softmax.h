// The online softmax over one block of scores, shared by the decode kernels.
#pragma once

#include "vector_math.h"

namespace tamis {

// Turn `count` products of one query with keys into weights exp(score - top), with a new top if
// there is one, and add them to the denominator. `scores` is writable to a whole number of vectors.
// Returns the factor that takes earlier sums to the new top.
template <class Isa>
float soften(float* scores, int64_t count, float scale, float softcap, float* top_of,
             float* denominator) {
  using Vec = typename Isa::Vec;
  using Math = VectorMath<Isa>;
  constexpr int kWidth = Isa::kWidth;
  constexpr float kNothing = -__builtin_inff();
  for (int64_t t = count; t % kWidth; ++t) scores[t] = scores[count - 1];
  Vec tops = Isa::set(kNothing);
  for (int64_t t = 0; t < count; t += kWidth) {
    const Vec score = Math::score(Isa::load(scores + t), scale, softcap);
    Isa::store(scores + t, score);
    tops = Isa::max(tops, score);
  }
  for (int64_t t = count; t % kWidth; ++t) scores[t] = kNothing;
  const float before = *top_of;
  const float block_top = Isa::max_lane(tops);
  const float top = block_top > before ? block_top : before;
  // Where every score is -inf, any finite origin gives the weights 0 that are wanted.
  const Vec origin = Isa::set(top == kNothing ? 0.0f : top);
  Vec total = Isa::set(0.0f);
  for (int64_t t = 0; t < count; t += kWidth) {
    const Vec weight = Math::exp(Isa::load(scores + t) - origin);
    Isa::store(scores + t, weight);
    total = total + weight;
  }
  float rescale = 0.0f;
  if (before != kNothing) rescale = Isa::first_lane(Math::exp(Isa::set(before - top)));
  *top_of = top;
  *denominator = *denominator * rescale + Isa::sum_lanes(total);
  return rescale;
}

}  // namespace tamis
