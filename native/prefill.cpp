#include "prefill.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace tamis {
namespace {

// Rows of a tile when there is enough work for all threads: packed keys and values are reused this
// often, and a tile's queries, scores and sums stay in the second-level cache.
constexpr int64_t kMaxRows = 256;
constexpr int64_t kMinRows = 24;

// Tiles per thread that even out their differing work.
constexpr int64_t kTilesPerThread = 4;

// All query heads of a KV head share a tile of at most `rows` rows.
std::vector<QueryTile> dense_tiles(const PrefillArgs& a, int64_t rows) {
  const int64_t group = a.q_heads / a.kv_heads;
  const int64_t step = std::max<int64_t>(1, rows / group);
  std::vector<QueryTile> tiles;
  for (int64_t first = 0; first < a.tokens; first += step) {
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      tiles.push_back({head * group, group, first, std::min(first + step, a.tokens)});
    }
  }
  return tiles;
}

bool equal(const IndexList& one, const IndexList& other) {
  return std::equal(one.begin, one.end, other.begin, other.end);
}

// Whether every query of heads `one` and `other` sees the same columns and window.
bool are_alike(const Pattern& p, int64_t one, int64_t other) {
  if (is_full(p, one) || is_full(p, other)) return is_full(p, one) && is_full(p, other);
  return window_of(p, one) == window_of(p, other) &&
         equal(columns_of(p, one), columns_of(p, other));
}

// Query heads that share a KV head and a query block's lists share a tile of at most `rows` rows,
// and so do successive query blocks with the same lists.
std::vector<QueryTile> sparse_tiles(const PrefillArgs& a, int64_t rows) {
  const Pattern& p = a.pattern;
  const int64_t group = a.q_heads / a.kv_heads;
  std::vector<bool> like_last(a.q_heads);
  for (int64_t head = 0; head < a.q_heads; ++head) {
    like_last[head] = head % group > 0 && are_alike(p, head - 1, head);
  }
  const auto same_blocks = [&](int64_t head, int64_t block, int64_t other_head, int64_t other) {
    return is_full(p, head) || equal(blocks_of(p, head, block), blocks_of(p, other_head, other));
  };
  std::vector<QueryTile> tiles;
  std::vector<int64_t> tile_of(a.q_heads, -1);  // of the last query block, by its first head
  for (int64_t block = 0; block < p.q_blocks; ++block) {
    const int64_t first = block * p.block, last = std::min(first + p.block, a.tokens);
    for (int64_t head = 0, heads; head < a.q_heads; head += heads) {
      heads = 1;
      while (head + heads < a.q_heads && like_last[head + heads] &&
             same_blocks(head, block, head + heads, block)) {
        ++heads;
      }
      QueryTile* before = tile_of[head] < 0 ? nullptr : &tiles[tile_of[head]];
      if (before != nullptr && before->last == first && before->heads == heads &&
          (last - before->first) * heads <= rows && same_blocks(head, block, head, block - 1)) {
        before->last = last;
        continue;
      }
      const int64_t most = std::max<int64_t>(1, rows / heads);
      const int64_t parts = (last - first + most - 1) / most;
      const int64_t step = (last - first + parts - 1) / parts;
      for (int64_t begin = first; begin < last; begin += step) {
        tiles.push_back({head, heads, begin, std::min(begin + step, last)});
      }
      tile_of[head] = static_cast<int64_t>(tiles.size()) - 1;
    }
  }
  return tiles;
}

}  // namespace

void prefill(const PrefillArgs& a, Isa isa, int threads) {
  const int64_t even = a.tokens * a.q_heads / (threads * kTilesPerThread);
  const int64_t rows = std::clamp(even, kMinRows, kMaxRows);
  const std::vector<QueryTile> tiles =
      a.pattern.block > 0 ? sparse_tiles(a, rows) : dense_tiles(a, rows);
  const int64_t most = std::max(rows, a.q_heads / a.kv_heads);
  const Scratch scratch(threads, prefill_scratch_floats(most, a.k_dim, a.v_dim));
  PrefillTile* const attend = kernels(isa).prefill_tile[static_cast<int>(a.dtype)];

  // The last tokens see most: they go first.
  const int64_t count = static_cast<int64_t>(tiles.size());
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t item = 0; item < count; ++item) {
    attend(a, tiles[count - 1 - item], scratch.mine());
  }
}

}  // namespace tamis
