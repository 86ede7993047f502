// Attention of one query token per sequence over encoded pages: codes, low ranks, outliers.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "decode.h"
#include "element.h"

namespace tamis {

// How the rows of a page's keys or values are stored.
enum class Rows {
  plain,       // elements
  by_channel,  // codes; a scale and a zero-point per channel and group of tokens
  by_token,    // codes; a scale and a zero-point per token and group of channels
  pruned,      // elements of some channels; the others are zero
};

// The keys or the values of a page: where its fields lie, as offsets from the page's start.
//
// Codes are packed into 16-bit words, 16 / bits (rounded down) per word: in a row of `words` words,
// bits j * bits .. of word h are the code of channel j * words + h.
struct Side {
  Rows rows;
  DType dtype;       // of elements, scales, zero-points, factors and outliers
  int64_t dim;       // channels
  int64_t elements;  // [page_size, dim or kept], or words [page_size, words]
  int64_t bits, group;
  int64_t scale, zero;  // [page_size / group, dim] or [page_size, dim / group]
  int64_t kept, mask;   // kept channels; uint8 [dim], which they are
  int64_t rank;         // of the correction left right, 0 for none
  int64_t left, right;  // [page_size, rank], [rank, dim]
  int64_t outliers;     // numbers added at single places, 0 for none
  int64_t places, added;  // indices into [page_size, dim], int16 or int32; the numbers
  bool wide_places;       // int32

  int64_t planes() const { return 16 / bits; }
  int64_t words() const { return (dim + planes() - 1) / planes(); }
  bool packed() const { return rows == Rows::by_channel || rows == Rows::by_token; }
};

// A range of the pages of one KV head, and the query heads that share it.
struct EncodedRange {
  const uint8_t* data;   // the arena
  const int32_t* table;  // ids of the head's pages
  int64_t begin, end;    // pages
  int64_t page_size;     // tokens
  int64_t page_bytes;    // from a page's start, that are read
  Side k, v;
  const void* q;  // [group, k_dim]
  DType q_dtype;
  int64_t q_stride;  // elements between query heads
  int64_t group;
  float scale, softcap;  // softcap 0 for none
};

// The kernel: attention over one range.
using AttendEncoded = void(const EncodedRange& range, float* scratch, const Partial& partial);

struct EncodedArgs {
  DType dtype;  // of q
  int64_t n, q_heads, kv_heads;
  const uint8_t* q;  // [n, q_heads, k_dim], strides in elements
  int64_t q_row_stride, q_head_stride;
  const uint8_t* data;
  int64_t page_size, page_bytes;
  Side k, v;
  const int32_t* tables;  // [n, kv_heads, max_pages]
  int64_t tables_row_stride, tables_head_stride;
  const int32_t* lengths;  // [n, kv_heads], tokens: whole pages
  int64_t lengths_row_stride, lengths_head_stride;
  float scale, softcap;  // softcap 0 for none
  float* out;            // [n, q_heads, v_dim], contiguous
  float* lse;            // [n, q_heads]
};

// The result does not depend on `threads`.
void decode_encoded(const EncodedArgs& args, Isa isa, int threads);

}  // namespace tamis
