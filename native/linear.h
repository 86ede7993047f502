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
  const void* weight;     // [out, in], contiguous: of `dtype`, or Int8 where there are scales
  const float* scales;    // [out], of the weight's rows, or null
  const void* bias;       // [out], contiguous, or null
  void* y;                // [rows, out], contiguous
};

// Outputs that are computed together, and that no two threads share: a whole number of vectors of
// any instruction set.
constexpr int64_t kOutputs = 16;

// Floats of scratch that a LinearRange needs: a block of products, the packed rows and a block of
// weights.
static constexpr int64_t linear_scratch_floats(int64_t rows, int64_t in) {
  return rows * kOutputs + (rows + kOutputs) * padded(in);
}

// The kernel: outputs begin..end of every row.
using LinearRange = void(const LinearArgs& args, int64_t begin, int64_t end, float* scratch);

// y = x weight^T (times scales) + bias, summed in fp32 and rounded once. The order in which an
// output's products are added depends on `in` and the instruction set alone.
void linear(const LinearArgs& args, Isa isa, int threads);

// The kernel for a layer.
struct Kernels;
LinearRange* linear_range_of(const Kernels& kernels, const LinearArgs& args);

}  // namespace tamis
