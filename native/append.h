// Writing new tokens to pages.
#pragma once

#include <cstdint>

namespace tamis {

// One field's new rows, [tokens, kv_heads, row_bytes] with strides in bytes.
struct NewRows {
  const uint8_t* rows;
  int64_t token_stride, head_stride;
  int64_t row_bytes;
  int64_t offset;  // of the field in a page
};

struct AppendArgs {
  uint8_t* data;
  int64_t page_size;
  const int32_t* tables;  // [n, kv_heads, max_pages]
  int64_t tables_row_stride, tables_head_stride;
  const int32_t* lengths;  // [n, kv_heads]
  int64_t lengths_row_stride, lengths_head_stride;
  const int64_t* starts;  // [n + 1]
  int64_t n, kv_heads;
  NewRows k, v, position;
};

// Token `t` of row `i` becomes token lengths[i, h] + t of each head `h`.
void append(const AppendArgs& args, int threads);

}  // namespace tamis
