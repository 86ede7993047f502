// Which keys a sparse prefill computes; attention/pattern.py says what the fields mean.
#pragma once

#include <cstdint>

namespace tamis {

struct Pattern {
  int64_t block, q_blocks;       // block 0: there is no pattern, every head sees everything
  const int32_t* block_starts;   // [q_heads, q_blocks + 1]
  const int32_t* blocks;
  const int32_t* column_starts;  // [q_heads + 1]
  const int32_t* columns;
  const int32_t* window;         // [q_heads], or null
  const uint8_t* full;           // [q_heads], or null
};

// Internal linkage, as in element.h.
namespace {

// Ascending indices of blocks or of keys.
struct IndexList {
  const int32_t *begin, *end;
};

[[maybe_unused]] inline IndexList blocks_of(const Pattern& p, int64_t q_head, int64_t q_block) {
  const int32_t* starts = p.block_starts + q_head * (p.q_blocks + 1) + q_block;
  return {p.blocks + starts[0], p.blocks + starts[1]};
}

[[maybe_unused]] inline IndexList columns_of(const Pattern& p, int64_t q_head) {
  return {p.columns + p.column_starts[q_head], p.columns + p.column_starts[q_head + 1]};
}

[[maybe_unused]] inline int64_t window_of(const Pattern& p, int64_t q_head) {
  return p.window != nullptr ? p.window[q_head] : 0;
}

[[maybe_unused]] inline bool is_full(const Pattern& p, int64_t q_head) {
  return p.block == 0 || (p.full != nullptr && p.full[q_head]);
}

}  // namespace
}  // namespace tamis
