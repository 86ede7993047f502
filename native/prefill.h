// Attention of a chunk of one sequence over its cached pages and, causally, over itself.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "decode.h"
#include "element.h"
#include "pages.h"
#include "pattern.h"

namespace tamis {

// Elements [tokens, heads, dim], strides in elements.
struct Heads {
  const uint8_t* data;
  int64_t token_stride, head_stride;
};

struct PrefillArgs {
  DType dtype;
  int64_t tokens, q_heads, kv_heads, k_dim, v_dim;
  Heads q, k, v;
  const uint8_t* data;
  int64_t page_size, k_offset, v_offset, position_offset;
  const int32_t* tables;  // [kv_heads, max_pages]
  int64_t tables_head_stride;
  const int32_t* lengths;  // [kv_heads], or null when nothing precedes the chunk
  int64_t lengths_head_stride;
  const int64_t* positions;  // [tokens], ascending
  int64_t window;            // 0 for none
  bool own;                  // whether the chunk sees itself; k and v are not read if not
  float scale, softcap;      // softcap 0 for none
  const float* sinks;        // [q_heads], or null
  Pattern pattern;
  void* out;                 // [tokens, q_heads, v_dim], contiguous
  float* lse;                // [tokens, q_heads]
};

// Keys that meet a tile of queries at once.
constexpr int64_t kKeys = 128;

// Rows of queries are padded to whole tiles of registers, which have at most this many.
constexpr int64_t kMostRows = 16;

// Floats of scratch that a PrefillTile of `rows` (token, query head) pairs needs.
static constexpr int64_t prefill_scratch_floats(int64_t rows, int64_t k_dim, int64_t v_dim) {
  const int64_t whole = rows + kMostRows - 1;
  return whole * (padded(k_dim) + padded(v_dim) + 2 * kKeys + 2) +
         kKeys * (padded(k_dim) + padded(v_dim));
}

// Tokens first..last of the chunk for `heads` query heads from `q_head` on, which share a KV head
// and see the same keys: the same lists of the pattern, if there is one.
struct QueryTile {
  int64_t q_head, heads;
  int64_t first, last;
};

// The kernel: out and lse of a tile's (token, query head) pairs.
using PrefillTile = void(const PrefillArgs& args, const QueryTile& tile, float* scratch);

// The result depends on neither `threads` nor how tokens are grouped into tiles.
void prefill(const PrefillArgs& args, Isa isa, int threads);

}  // namespace tamis
