// What a decoder layer does to single rows beside its matrices: norms, rotations, activations.
#pragma once

#include <cstdint>

#include "element.h"

namespace tamis {

// Root mean square normalization (arXiv 1910.07467, equation 4), and where models round.
enum class RmsStyle {
  rounded,   // the normalized row is rounded to its type before it meets the weight (Llama)
  weighted,  // it is multiplied with the weight in fp32 and rounded once
  plus_one,  // the same with 1 + weight (Gemma)
};

struct RmsNorm {
  const void* weight;  // [width], null for no norm
  float epsilon;
  RmsStyle style;
};

// The kernels, for one row of an element type. Results may take the place of operands.

// y = norm(x), x and y [width].
using RmsNormRow = void(const RmsNorm& norm, const void* x, int64_t width, void* y);

// x [width] of a head turned by RoPE: elements i and i + rotated / 2 are a pair, those from
// `rotated` on stay. cos and sin [rotated].
using RotateRow = void(void* x, const void* cos, const void* sin, int64_t rotated);

// gate = silu(gate) up, rounded after the activation and after the product.
using GateRow = void(void* gate, const void* up, int64_t width);

// y = x + y.
using AddRow = void(const void* x, void* y, int64_t width);

}  // namespace tamis
