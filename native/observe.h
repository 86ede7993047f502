// Statistics of attention over paged keys: scores, and the softmax's weights exp(score - lse).
#pragma once

#include <cstdint>

#include "cpu.h"
#include "decode.h"
#include "element.h"
#include "pages.h"
#include "prefill.h"

namespace tamis {

struct ObserveArgs {
  DType dtype;
  int64_t n, q_heads, kv_heads, k_dim;
  Heads q;  // [n, q_heads, k_dim]
  const uint8_t* data;
  int64_t page_size, k_offset, position_offset;
  const int32_t* tables;  // [rows, kv_heads, max_pages]
  int64_t tables_row_stride, tables_head_stride;
  const int32_t* lengths;  // [rows, kv_heads]
  int64_t lengths_row_stride, lengths_head_stride;
  const int64_t* positions;  // [n]: a query sees cached tokens up to its own; null sees all
  int64_t window;            // 0 for none
  float scale, softcap;      // softcap 0 for none
  const float* lse;          // [n, q_heads], contiguous, or null
  float* out;
  int64_t width;  // columns of `out`, at least the longest head's length
};

// Keys of one item of an observed chunk: what a tile of packed queries meets before it is replaced.
constexpr int64_t kSpan = 512;

// Rows of a tile of queries, at least: with their scores they stay in the first-level cache.
constexpr int64_t kQueryRows = 60;

// Tokens per item of an observed decode.
constexpr int64_t kObserved = 512;

// Tokens of a tile of queries.
static constexpr int64_t query_tile(int64_t group) {
  return group < kQueryRows ? kQueryRows / group : 1;
}

// Floats of scratch that an ObserveSpan needs.
static constexpr int64_t span_scratch_floats(int64_t group, int64_t k_dim) {
  const int64_t rows = query_tile(group) * group + kMostRows - 1;
  return padded(k_dim) * (kSpan + rows) + rows * kKeys + group * kSpan;
}

// Floats of scratch that an ObserveRange needs.
static constexpr int64_t range_scratch_floats(int64_t group, int64_t k_dim) {
  return group * (padded(k_dim) + kBlock);
}

// The kernel of observe_chunk: keys begin..end, at most kSpan, of KV head `head`.
using ObserveSpan = void(const ObserveArgs& args, int64_t head, int64_t begin, int64_t end,
                         float* scratch);

// The kernel of observe_decode: tokens begin..end, at most kObserved, of a head of row `row`.
using ObserveRange = void(const ObserveArgs& args, int64_t row, int64_t head, int64_t begin,
                          int64_t end, float* scratch);

// All n queries, at ascending positions, over the one row of pages. With lse: the sums of the
// queries' weights for each cached token, out [q_heads, width]. Without: the scores, out
// [q_heads, n, width]. What is not seen stays as it is.
void observe_chunk(const ObserveArgs& args, Isa isa, int threads);

// Query `i` over row `i` of the pages: its weights, or its scores without lse, out
// [n, q_heads, width]. What is not seen stays as it is.
void observe_decode(const ObserveArgs& args, Isa isa, int threads);

}  // namespace tamis
