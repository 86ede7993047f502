// Which pages a query could match best, by the bounds of their keys that lie in the pages.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "decode.h"
#include "element.h"
#include "prefill.h"

namespace tamis {

// Pages of n rows whose fields at low_offset and high_offset hold, once per page, the smallest and
// the largest element of its keys in each channel, [k_dim] of the queries' type.
struct BoundedPages {
  const uint8_t* data;
  int64_t page_size, low_offset, high_offset;
  const int32_t* tables;  // [n, kv_heads, max_pages]
  int64_t tables_row_stride, tables_head_stride;
  const int32_t* lengths;  // [n, kv_heads], tokens
  int64_t lengths_row_stride, lengths_head_stride;
};

struct TopPagesArgs {
  DType dtype;
  int64_t n, q_heads, kv_heads, k_dim;
  Heads q;                 // [n, q_heads, k_dim]
  BoundedPages before;     // full pages that come first; `data` null for none
  BoundedPages pages;
  int64_t count;
  int64_t* out;  // [n, kv_heads, count]
};

// A run of pages of one head, and the query heads that share it.
struct BoundedRange {
  const uint8_t* data;
  const int32_t* table;
  int64_t count, low_offset, high_offset;
  const void* q;     // [group, k_dim]
  int64_t q_stride;  // elements between query heads
  int64_t group, k_dim;
  float* out;  // [count]
};

// Floats of scratch that BoundPages needs.
static constexpr int64_t bound_scratch_floats(int64_t group, int64_t k_dim) {
  return 2 * group * (padded(k_dim) + kBlock);
}

// The kernel: each page's bound, the largest over the queries of the group.
using BoundPages = void(const BoundedRange& range, float* scratch);

// Of each row's head the last page and the `count` - 1 others of largest bound (of equal ones the
// first), ascending; then, where it has fewer pages, numbers after its last. The result does not
// depend on `threads`.
void top_pages(const TopPagesArgs& args, Isa isa, int threads);

}  // namespace tamis
