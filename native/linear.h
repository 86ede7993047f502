// Linear layers for a few rows, where reading the weights is what costs.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "decode.h"
#include "element.h"

namespace tamis {

struct LinearArgs {
  DType dtype;
  int64_t rows, in, out;  // sizes
  const void* x;          // [rows, in]
  int64_t x_stride;       // of its rows, in elements
  const void* weight;     // [out, in], contiguous
  const void* bias;       // [out], contiguous, or null
  void* y;                // [rows, out], contiguous
};

// Outputs that are computed together, and that no two threads share: a whole number of vectors of
// any instruction set.
constexpr int64_t kOutputs = 16;

// Floats of scratch that a LinearRange needs: the packed rows and a block of products.
static constexpr int64_t linear_scratch_floats(int64_t rows, int64_t in) {
  return rows * (padded(in) + kOutputs);
}

// The kernel: outputs begin..end of every row.
using LinearRange = void(const LinearArgs& args, int64_t begin, int64_t end, float* scratch);

// y = x weight^T + bias, summed in fp32 and rounded once. The order in which an output's products
// are added depends on `in` and the instruction set alone.
void linear(const LinearArgs& args, Isa isa, int threads);

}  // namespace tamis
