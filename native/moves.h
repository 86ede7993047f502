// Copies of what is cached: tokens between pages, and runs of bytes between pages and tensors.
#pragma once

#include <cstdint>
#include <vector>

namespace tamis {

// A field with a row per token.
struct RowField {
  int64_t offset;  // of its first row in a page
  int64_t row_bytes;
};

// Tokens by page ids and rows within the page.
struct Places {
  const int32_t *pages, *rows;  // [n]
};

struct MoveArgs {
  uint8_t* data;  // the arena
  int64_t n;
  Places source, target;
  std::vector<RowField> fields;
  bool at_once;
};

// Copies token `i` of the source, with all fields, to place `i` of the target. Many tokens are read
// before any of them is written; with `at_once` all are, else a token may lie where an earlier move
// reads, not where an earlier move writes.
void move_tokens(const MoveArgs& args, int threads);

// Runs of equally many bytes: one at the same place of each page, or one after the other.
struct Runs {
  uint8_t* base;         // of the run in the page with id 0, or of the first run
  const int32_t* pages;  // [n], or null for runs one after the other
};

// Copies `n` runs of `bytes` bytes; none of those written is read.
void copy_runs(const Runs& source, const Runs& target, int64_t n, int64_t bytes, int threads);

// Whether all of `n` numbers lie within 0 .. limit - 1.
bool within(const int32_t* numbers, int64_t n, int64_t limit);

}  // namespace tamis
