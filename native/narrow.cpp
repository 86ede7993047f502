#include "narrow.h"

#include <algorithm>

namespace tamis {

void narrow(const NarrowArgs& a) {
  for (int64_t s = 0; s < a.n * a.kv_heads; ++s) {
    const int64_t row = s / a.kv_heads, head = s % a.kv_heads;
    const int32_t* table = a.tables + row * a.tables_row_stride + head * a.tables_head_stride;
    const int64_t* chosen = a.chosen + row * a.chosen_row_stride + head * a.chosen_head_stride;
    const int64_t tokens = a.lengths[row * a.lengths_row_stride + head * a.lengths_head_stride];
    const int64_t first = a.before != nullptr ? a.before[s] : 0;
    int32_t* out = a.out_tables + s * a.count;
    int64_t read = 0;
    for (int64_t i = 0; i < a.count; ++i) {
      const int64_t page = chosen[i] - first, at = page * a.page_size;
      if (page < 0 || at >= tokens) continue;
      *out++ = table[page];
      read += std::min(a.page_size, tokens - at);
    }
    std::fill(out, a.out_tables + (s + 1) * a.count, 0);
    a.out_lengths[s] = static_cast<int32_t>(read);
  }
}

}  // namespace tamis
