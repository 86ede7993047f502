#include "append.h"

#include <cstring>

#include "pages.h"

namespace tamis {
namespace {

// Below this many bytes waking other threads costs more than they save.
constexpr int64_t kParallelBytes = 1 << 18;

void copy_row(const NewRows& field, int64_t token, int64_t head, uint8_t* page, int64_t slot) {
  std::memcpy(page + field.offset + slot * field.row_bytes,
              field.rows + token * field.token_stride + head * field.head_stride, field.row_bytes);
}

}  // namespace

void append(const AppendArgs& a, int threads) {
  const int64_t tokens = a.starts[a.n] - a.starts[0];
  const int64_t bytes = tokens * a.kv_heads * (a.k.row_bytes + a.v.row_bytes);
  if (bytes < kParallelBytes) threads = 1;
  // By head rather than by row: one row may be a long prompt among single tokens.
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t head = 0; head < a.kv_heads; ++head) {
    for (int64_t row = 0; row < a.n; ++row) {
      const int32_t* table =
          a.tables + row * a.tables_row_stride + head * a.tables_head_stride;
      int64_t at = a.lengths[row * a.lengths_row_stride + head * a.lengths_head_stride];
      for (int64_t token = a.starts[row]; token < a.starts[row + 1]; ++token, ++at) {
        uint8_t* page = a.data + table[at / a.page_size] * kUnit;
        const int64_t slot = at % a.page_size;
        copy_row(a.k, token, head, page, slot);
        copy_row(a.v, token, head, page, slot);
        copy_row(a.position, token, head, page, slot);
      }
    }
  }
}

}  // namespace tamis
