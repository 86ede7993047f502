// Softmax over scores of cached tokens, and the tokens that it weighs most.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace tamis {

struct SoftmaxArgs {
  int64_t n, q_heads, kv_heads, width;
  float* scores;           // [n, q_heads, width], contiguous; becomes the weights
  const int32_t* lengths;  // [n, kv_heads]
  int64_t lengths_row_stride, lengths_head_stride;
  int64_t first, last;      // a head's tokens first .. length - last - 1 have weights
  const float* divisors;   // [n, q_heads], of the scores; or null
};

// The kernel: scores[begin..end] become exp(factor score) over their sum, the others zero.
using SoftmaxRow = void(float* scores, int64_t width, int64_t begin, int64_t end, float factor);

// The softmax of every query head over some of its tokens. The result does not depend on `threads`.
void softmax_tokens(const SoftmaxArgs& args, Isa isa, int threads);

struct TopTokensArgs {
  int64_t rows, width, row_stride;
  const float* values;     // [rows, width]
  const int64_t* lengths;  // [rows], at most width: values beyond are not looked at
  int64_t first, last;     // so many first and last tokens are always among the `count`
  int64_t count;
  int64_t* out;            // [rows, count]
};

// Of each row the first and last tokens and, between them, those of largest value (of equal ones
// the first), ascending; then, where it has fewer than `count`, indices after its last.
void top_tokens(const TopTokensArgs& args, int threads);

}  // namespace tamis
