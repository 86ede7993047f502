// Threads own keys, so the result is the same for any number of them.

#include "nearest.h"

#include <algorithm>

#include "kernels.h"
#include "scratch.h"

namespace tamis {

void nearest(const NearestArgs& a, Isa isa, int threads) {
  const int64_t items = (a.n + kNearestRows - 1) / kNearestRows;
  threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, items)));
  const Scratch scratch(threads, nearest_scratch_floats(a.dim));
  NearestRange* const range = kernels(isa).nearest_range[static_cast<int>(a.dtype)];
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t begin = item * kNearestRows;
    range(a, begin, std::min(a.n, begin + kNearestRows), scratch.mine());
  }
}

}  // namespace tamis
