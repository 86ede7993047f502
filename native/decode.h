// Attention of one query token per sequence over paged keys and values.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "element.h"
#include "pages.h"

namespace tamis {

// A range of the tokens of one KV head, and the query heads that share it.
struct Range {
  Pages pages;
  const int32_t* tokens;       // those to read, ascending; null for all
  int64_t begin, end;          // tokens, or indices of `tokens`
  int64_t ahead;               // until where it goes on after this range, at least `end`
  bool warm;                   // whether the range before this one ended here
  int64_t k_offset, v_offset;  // of the fields in a page
  const void* q;               // [group, k_dim]
  int64_t q_stride;            // elements between query heads
  int64_t group, k_dim, v_dim;
  float scale, softcap;  // softcap 0 for none
};

// Attention over one range before normalization, for each query head of the group.
struct Partial {
  float* sums;         // [group, padded v_dim]: sum of exp(score - top) v
  float* top;          // [group]: largest score
  float* denominator;  // [group]: sum of exp(score - top)
};

// Rows of `sums` and of packed queries are padded to whole vectors of any instruction set.
constexpr int64_t kPad = 32;
static constexpr int64_t padded(int64_t dim) { return (dim + kPad - 1) / kPad * kPad; }

// Tokens whose scores are held at once.
constexpr int64_t kBlock = 128;

// Floats of scratch that an AttendRange needs: packed queries and one block of scores.
static constexpr int64_t scratch_floats(int64_t group, int64_t k_dim) {
  return group * (padded(k_dim) + kBlock);
}

// The kernel: attention over one range.
using AttendRange = void(const Range& range, float* scratch, const Partial& partial);

struct DecodeArgs {
  DType dtype;
  int64_t n, q_heads, kv_heads, k_dim, v_dim;
  const uint8_t* q;  // [n, q_heads, k_dim], strides in elements
  int64_t q_row_stride, q_head_stride;
  const uint8_t* data;
  int64_t page_size, k_offset, v_offset, position_offset;
  const int32_t* tables;  // [n, kv_heads, max_pages]
  int64_t tables_row_stride, tables_head_stride;
  const int32_t* lengths;  // [n, kv_heads]
  int64_t lengths_row_stride, lengths_head_stride;
  const int32_t* tokens;  // [n, kv_heads, most]: cached tokens to read, ascending; null for all
  int64_t tokens_row_stride, tokens_head_stride;
  const int32_t* counts;     // [n, kv_heads], contiguous, of `tokens`
  const int64_t* positions;  // [n], or null when there is no window
  int64_t window;            // 0 for none
  float scale, softcap;      // softcap 0 for none
  const float* sinks;        // [q_heads], or null
  void* out;                 // [n, q_heads, v_dim], contiguous
  float* lse;                // [n, q_heads]
};

// The result does not depend on `threads`.
void decode(const DecodeArgs& args, Isa isa, int threads);

}  // namespace tamis
