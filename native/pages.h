// Where the tokens of one KV head lie.
#pragma once

#include <cstdint>

namespace tamis {

// Page ids count units of this many bytes from the start of the arena (cache/format.py).
constexpr int64_t kUnit = 64;

struct Pages {
  const uint8_t* data;   // the arena
  const int32_t* table;  // ids of the head's pages
  int64_t page_size;     // tokens

  // Row of `token` in the field that starts `offset` bytes into a page, `row_bytes` per token.
  const uint8_t* row(int64_t token, int64_t offset, int64_t row_bytes) const {
    return data + table[token / page_size] * kUnit + offset + token % page_size * row_bytes;
  }
};

// First of the tokens low..high at `position` or later, `high` if there is none; positions, whose
// field starts `offset` bytes into a page, ascend.
int64_t first_from(const Pages& pages, int64_t offset, int64_t low, int64_t high,
                   int64_t position);

}  // namespace tamis
