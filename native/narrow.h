// Page tables cut down to some pages of each head.
#pragma once

#include <cstdint>

namespace tamis {

struct NarrowArgs {
  int64_t n, kv_heads, page_size;
  const int32_t* tables;  // [n, kv_heads, max_pages]
  int64_t tables_row_stride, tables_head_stride;
  const int32_t* lengths;  // [n, kv_heads]
  int64_t lengths_row_stride, lengths_head_stride;
  const int64_t* chosen;  // [n, kv_heads, count], ascending
  int64_t chosen_row_stride, chosen_head_stride, count;
  const int64_t* before;  // [n, kv_heads], contiguous: what numbers of pages begin with; or null
  int32_t* out_tables;    // [n, kv_heads, count], contiguous
  int32_t* out_lengths;   // [n, kv_heads], contiguous
};

// The chosen pages that a head has, and the tokens in them; what it has not is passed over.
void narrow(const NarrowArgs& args);

}  // namespace tamis
