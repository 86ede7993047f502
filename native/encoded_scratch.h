// How the codes of encoded pages meet vectors of a size, and what memory that needs.
//
// Internal linkage, as in element.h: compiled once per instruction set.
#pragma once

#include "encoded.h"

namespace tamis {
namespace {

// Rows of codes that are decoded at once where they are not multiplied as integers.
constexpr int64_t kDecodedRows = 16;

// Codes in vectors of so many bytes.
struct Packing {
  int64_t rows = 0;  // of a page per vector; 0 where codes are not multiplied as integers
  int64_t vectors = 1;  // per row
  int64_t groups = 1;   // of channels, for values
};

// Tokens per block, or one page: many, because what is done once per block takes its time; few
// enough for the block's words and weights to stay in the first-level cache.
constexpr int64_t kEncodedBlock = 256;

[[maybe_unused]] inline int64_t block_pages(int64_t page_size) {
  return page_size < kEncodedBlock ? kEncodedBlock / page_size : 1;
}

[[maybe_unused]] inline int64_t block_tokens(int64_t page_size) {
  return block_pages(page_size) * page_size;
}

// Whether a sum of `count` products of codes with 16-bit integers fits 32 bits.
[[maybe_unused]] inline bool sums_fit(int64_t count, int64_t bits) {
  return count * ((int64_t{1} << bits) - 1) * 32767 < int64_t{1} << 31;
}

// Rows of whole 32-bit words of which `bytes` bytes hold several fill them, if their number
// divides `run`, the rows that lie one after the other.
[[maybe_unused]] inline Packing packing_of(const Side& side, int64_t run, int64_t bytes) {
  const int64_t row_bytes = side.words() * 2;
  Packing packing;
  packing.rows = row_bytes % 4 == 0 && bytes % row_bytes == 0 ? bytes / row_bytes : 1;
  if (run % packing.rows != 0) packing.rows = 1;
  packing.vectors = packing.rows > 1 ? 1 : (row_bytes + bytes - 1) / bytes;
  return packing;
}

[[maybe_unused]] inline Packing packing_of_keys(const Side& side, int64_t page_size,
                                                int64_t bytes) {
  (void)page_size;
  if (side.rows != Rows::by_channel || !sums_fit(side.dim, side.bits)) return {};
  return packing_of(side, side.group, bytes);
}

[[maybe_unused]] inline Packing packing_of_values(const Side& side, int64_t page_size,
                                                  int64_t bytes) {
  if (side.rows != Rows::by_token || page_size % 2 != 0) return {};
  const int64_t words = side.words();
  Packing packing = packing_of(side, page_size, bytes);
  packing.groups = side.dim / side.group;
  // A lane adds up the products of two tokens of each vector.
  const int64_t joined = packing.rows > 1 ? packing.rows : 2;
  if (!sums_fit(block_tokens(page_size) / joined * 2, side.bits)) return {};
  // The channels of a vector of one plane must share their groups.
  for (int64_t p = 0; p < side.planes(); ++p) {
    for (int64_t first = 0; first < words; first += bytes / 2) {
      const int64_t end = first + bytes / 2 < words ? first + bytes / 2 : words;
      const int64_t low = p * words + first, high = p * words + end;
      const int64_t last = (high < side.dim ? high : side.dim) - 1;
      if (low <= last && low / side.group != last / side.group) return {};
    }
  }
  return packing;
}

// The kernel's memory. Strides are in elements, per query.
struct EncodedScratch {
  float* q;         // [group, padded k_dim]
  float* packed_q;  // [group, padded k_dim]: as inner products take them
  float* scores;    // [group, score_stride]
  float* rescale;   // [group]
  float* tops;      // [units, group, vector], a unit being a group of tokens of the block's keys,
  float* bases;     //   or its values: what is reduced to
  float* share;     // [units, group]: 1 / step, or 0
  float* step;      // [units, group]: what 1 of the 16-bit integers stands for
  float* base;      // [units, group]: q . zero
  float* k_scale;   // [units, padded k_dim]
  float* rows;      // [kDecodedRows, padded dim]
  float* left;      // [rank, score_stride]
  int16_t* q16;     // [group, q16_stride]
  uint8_t* columns;         // [pairs of words, 2, vector]: of two vectors of tokens
  float* plane_sums;        // [group, plane_stride]
  float* zeros;             // [group, groups, vector]: the zero-points' part of the sums
  float *v_scale, *v_zero;  // [groups, token_stride]
  int16_t* w16;             // [group, groups, token_stride]
  uint8_t* joined;          // the block's words, those of two tokens or more side by side
  const uint8_t* mask_of;  // of the channels that packed_q has
  int64_t score_stride, q16_stride, plane_stride, token_stride;
};

// Point `to` at its parts of the memory from `base`, for vectors of `bytes` bytes; returns the
// floats that it takes.
[[maybe_unused]] inline int64_t carve(const EncodedRange& r, int64_t bytes, float* base,
                                      EncodedScratch* to) {
  constexpr int64_t kLine = 16;  // floats
  int64_t taken = 0;
  const auto take = [&](int64_t n_bytes) {
    float* const at = base == nullptr ? nullptr : base + taken;
    // What follows may be read up to a vector beyond its end.
    taken += (n_bytes / 4 / kLine + 2) * kLine + kLine;
    return at;
  };
  const Packing values = packing_of_values(r.v, r.page_size, bytes);
  const int64_t tokens = block_tokens(r.page_size), group = r.group;
  const int64_t k_pad = padded(r.k.dim), v_pad = padded(r.v.dim);
  const int64_t most_pad = k_pad > v_pad ? k_pad : v_pad;
  const int64_t rank = r.k.rank > r.v.rank ? r.k.rank : r.v.rank;
  to->score_stride = (tokens / kLine + 1) * kLine + 5 * kLine;
  to->q16_stride = 2 * k_pad + 2 * kPad;
  to->plane_stride = 0;
  to->q = take(group * k_pad * 4);
  to->packed_q = take(group * k_pad * 4);
  to->scores = take(group * to->score_stride * 4);
  to->rescale = take(group * 4);
  const int64_t units = r.k.rows == Rows::by_channel ? tokens / r.k.group : 1;
  // Read and written to whole vectors of sets.
  const int64_t sets = (units * group + bytes / 4 - 1) / (bytes / 4) * (bytes / 4);
  to->tops = take(sets * bytes);
  to->bases = take(sets * bytes);
  to->step = take(sets * 4);
  to->share = take(sets * 4);
  to->base = take(sets * 4);
  to->k_scale = take(units * k_pad * 4);
  to->rows = take(kDecodedRows * most_pad * 4);
  to->left = take(rank * to->score_stride * 4);
  to->q16 = reinterpret_cast<int16_t*>(take(group * to->q16_stride * 2));
  const int64_t k_vectors = (r.k.words() * 2 + bytes - 1) / bytes;
  to->columns = reinterpret_cast<uint8_t*>(take(k_vectors * (bytes / 4) * 2 * bytes));
  to->token_stride = (tokens + 2 * kLine - 1) / (2 * kLine) * 2 * kLine;
  if (values.rows > 0) {
    const int64_t joined = tokens / (values.rows > 1 ? values.rows : 2);
    const int64_t halves = values.rows > 1 ? 1 : 2, numbers = values.groups * to->token_stride;
    to->plane_stride = values.vectors * r.v.planes() * halves * (bytes / 4);
    to->plane_sums = take(group * to->plane_stride * 4);
    to->zeros = take(group * values.groups * bytes);
    to->v_scale = take(numbers * 4);
    to->v_zero = take(numbers * 4);
    to->w16 = reinterpret_cast<int16_t*>(take(group * numbers * 2));
    to->joined = reinterpret_cast<uint8_t*>(take(joined * values.vectors * halves * bytes));
  }
  return taken;
}

}  // namespace
}  // namespace tamis
