// Groups of numbers as a zero-point, a scale and few bits each (attention/quantize.py).
#pragma once

#include <cstdint>

#include "cpu.h"
#include "element.h"

namespace tamis {

struct QuantizeArgs {
  DType dtype;       // of x
  DType half;        // of scales and zero-points: fp16 or bf16
  bool along_tokens;  // a group is some tokens of one channel, else some channels of one token
  int64_t tokens, dim, group;
  int64_t bits;  // of a code, 1 to 8
  const void* x;  // [tokens, dim], contiguous
  uint16_t* codes;  // [tokens, words_of(dim, bits)], packed plane by plane
  uint16_t *scale, *zero;  // [tokens / group, dim] or [tokens, dim / group]
};

// Words of 16 bits that hold the codes of a token.
inline int64_t words_of(int64_t dim, int64_t bits) {
  const int64_t planes = 16 / bits;
  return (dim + planes - 1) / planes;
}

// Zeros that the kernel needs: a zero-point and a divisor per channel, and the codes of a token with
// those of whole words and vectors behind them.
inline int64_t quantize_scratch_floats(int64_t dim, int64_t bits) {
  return 2 * dim + words_of(dim, bits) * (16 / bits) + 16;
}

// The kernel, for one element type: the tokens begin .. end - 1, which are whole groups.
using QuantizeRange = void(const QuantizeArgs& args, int64_t begin, int64_t end, float* scratch);

void quantize(const QuantizeArgs& args, Isa isa, int threads);

}  // namespace tamis
