// For each of some keys the most similar of others, by the cosine (attention/nearest.py).
#pragma once

#include <cstdint>

#include "cpu.h"
#include "element.h"

namespace tamis {

struct NearestArgs {
  DType dtype;
  int64_t n, among, dim;  // keys, keys to choose among (at least one), their elements
  const void *keys, *others;  // [n, dim], [among, dim], contiguous
  const float *key_scales, *other_scales;  // one over their lengths, [n], [among]
  float* similarity;  // [n]
  int64_t* index;     // [n], the first of equals
};

constexpr int64_t kNearestRows = 96;      // keys that meet the others at once: whole tiles
constexpr int64_t kNearestColumns = 256;  // others that are packed at once

// Floats of scratch for elements of up to 4 bytes; dimensions are padded to whole tiles.
inline int64_t nearest_scratch_floats(int64_t dim) {
  return (kNearestRows + kNearestColumns) * (dim + 64) + kNearestRows * kNearestColumns;
}

// The kernel, for one element type: the keys begin .. end - 1, at most kNearestRows.
using NearestRange = void(const NearestArgs& args, int64_t begin, int64_t end, float* scratch);

void nearest(const NearestArgs& args, Isa isa, int threads);

}  // namespace tamis
