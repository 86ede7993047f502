// Threads own keys, so the result is the same for any number of them.

#include "nearest.h"

#include <algorithm>
#include <memory>

#include "kernels.h"
#include "threads.h"

namespace tamis {

void nearest(const NearestArgs& a, Isa isa, int threads) {
  const int64_t items = (a.n + kNearestRows - 1) / kNearestRows;
  threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, items)));
  const int64_t scratch_size = nearest_scratch_floats(a.dim);
  const std::unique_ptr<float[]> scratch(new float[threads * scratch_size]);
  NearestRange* const range = kernels(isa).nearest_range[static_cast<int>(a.dtype)];
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t begin = item * kNearestRows;
    range(a, begin, std::min(a.n, begin + kNearestRows),
          scratch.get() + thread_index() * scratch_size);
  }
}

}  // namespace tamis
