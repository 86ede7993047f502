#include "prefill.h"

#include <algorithm>
#include <memory>

#include "kernels.h"
#include "threads.h"

namespace tamis {
namespace {

// Rows of a tile when there is enough work for all threads: packed keys and values are reused this
// often, and a tile's queries, scores and sums stay in the second-level cache.
constexpr int64_t kMaxRows = 252;
constexpr int64_t kMinRows = 24;

// Tiles per thread that even out their differing work.
constexpr int64_t kTilesPerThread = 4;

}  // namespace

void prefill(const PrefillArgs& a, Isa isa, int threads) {
  const int64_t group = a.q_heads / a.kv_heads;
  const int64_t even = a.tokens * a.q_heads / (threads * kTilesPerThread);
  const int64_t rows = std::clamp(even, kMinRows, kMaxRows);
  const int64_t tile = std::max<int64_t>(1, rows / group);  // tokens
  const int64_t tiles = (a.tokens + tile - 1) / tile;
  const int64_t scratch_size = prefill_scratch_floats(tile * group, a.k_dim, a.v_dim);
  const std::unique_ptr<float[]> scratch(new float[threads * scratch_size]);
  PrefillTile* const attend = kernels(isa).prefill_tile[static_cast<int>(a.dtype)];

  // The last tokens see most: they go first.
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t item = 0; item < tiles * a.kv_heads; ++item) {
    const int64_t first = (tiles - 1 - item / a.kv_heads) * tile;
    attend(a, item % a.kv_heads, first, std::min(first + tile, a.tokens),
           scratch.get() + thread_index() * scratch_size);
  }
}

}  // namespace tamis
