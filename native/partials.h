// Partial attentions of the chunks into which a decode call is cut, and how a head's are merged.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "decode.h"

namespace tamis {

// Tokens per chunk of a head of so many tokens: few enough to balance, enough to make merging free.
// Long heads have longer chunks, for which preparing their queries is less of the work.
inline int64_t chunk_tokens(int64_t tokens) {
  constexpr int64_t kShortest = 512, kLongest = 4096, kChunks = 8;
  const int64_t share = tokens / kChunks;
  return share < kShortest ? kShortest : share > kLongest ? kLongest : share;
}

// Memory for the partial attentions of `chunks` chunks.
class Partials {
 public:
  Partials(int64_t chunks, int64_t group, int64_t v_dim)
      : group_(group),
        width_(padded(v_dim)),
        floats_(new float[chunks * group * (width_ + 2)]),
        scalars_(floats_.get() + chunks * group * width_) {}

  Partial of(int64_t chunk) const {
    float* scalars = scalars_ + chunk * group_ * 2;
    return {floats_.get() + chunk * group_ * width_, scalars, scalars + group_};
  }

 private:
  int64_t group_, width_;
  std::unique_ptr<float[]> floats_;
  float* scalars_;
};

// Where merged results go.
struct MergeTarget {
  DType dtype;
  int64_t group, v_dim;
  void* out;   // [queries, v_dim] of `dtype`
  float* lse;  // [queries]
};

// Merge the partials of the chunks first..last, in order, for query `g` of their group, which is
// row `query` of the results; `sink` is one more logit of the denominator, -inf for none.
template <class T>
void merge_query(const MergeTarget& to, const Partials& partials, int64_t first, int64_t last,
                 int64_t g, int64_t query, float sink, float* sums) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  float top = sink;
  for (int64_t c = first; c < last; ++c) top = std::fmax(top, partials.of(c).top[g]);
  // With no finite score every weight is 0 for any finite origin, and NaN stays NaN.
  const float origin = top == kNothing ? 0.0f : top;
  float denominator = std::exp(sink - origin);
  std::memset(sums, 0, to.v_dim * sizeof(float));
  for (int64_t c = first; c < last; ++c) {
    const Partial partial = partials.of(c);
    const float weight = std::exp(partial.top[g] - origin);
    const float* chunk_sums = partial.sums + g * padded(to.v_dim);
    denominator += weight * partial.denominator[g];
    for (int64_t d = 0; d < to.v_dim; ++d) sums[d] += weight * chunk_sums[d];
  }
  const float share = denominator == 0.0f ? 0.0f : 1.0f / denominator;
  T* out = static_cast<T*>(to.out) + query * to.v_dim;
  for (int64_t d = 0; d < to.v_dim; ++d) from_float(sums[d] * share, out + d);
  to.lse[query] = origin + std::log(denominator);
}

// The same for every query of a group, whose first is row `query`; `sinks` has one logit per query
// of the group, or is null. `sums` is scratch for v_dim floats.
inline void merge_partials(const MergeTarget& to, const Partials& partials, int64_t first,
                           int64_t last, int64_t query, const float* sinks, float* sums) {
  for (int64_t g = 0; g < to.group; ++g) {
    const float sink = sinks ? sinks[g] : -std::numeric_limits<float>::infinity();
    switch (to.dtype) {
      case DType::fp32:
        merge_query<float>(to, partials, first, last, g, query + g, sink, sums);
        break;
      case DType::fp16:
        merge_query<Fp16>(to, partials, first, last, g, query + g, sink, sums);
        break;
      case DType::bf16:
        merge_query<Bf16>(to, partials, first, last, g, query + g, sink, sums);
        break;
    }
  }
}

}  // namespace tamis
