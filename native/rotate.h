// Keys that RoPE has rotated, turned further (model/rotate.py).
#pragma once

#include <cstdint>

#include "cpu.h"
#include "element.h"

namespace tamis {

struct RotateArgs {
  DType dtype;
  int64_t rows, tokens;  // `rows` keys, of `tokens` tokens over and over
  int64_t dim, pairs;    // the first 2 * pairs elements of a key are turned
  bool interleaved;      // pairs are elements 2i and 2i + 1, else i and i + pairs
  const void* k;         // [rows, dim], contiguous
  const float *cos, *sin;  // [angles, pairs], contiguous
  const int64_t* angle;    // which of them is each token's, [tokens]
  void* out;               // like k
};

// The kernel, for one element type: one key.
using RotateKey = void(const RotateArgs& args, int64_t row);

void rotate_keys(const RotateArgs& args, Isa isa, int threads);

}  // namespace tamis
