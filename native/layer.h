// A decoder layer but for its attention: pre-norm, rotary embedding, gated MLP, as Llama has them.
// For a few rows one call before and one after the attention; for many, what lies between products
// of matrices.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "element.h"
#include "rows.h"

namespace tamis {

// A matrix of a layer, applied as in linear.h.
struct Matrix {
  const void* weight;   // [out, in], contiguous
  const void* bias;     // [out], contiguous, or null
  int64_t out;
  const float* scales;  // [out] of weights in Int8, or null
};

// q, k, v of rows x [rows, width]: norm, projections, norms of heads, RoPE.
struct LayerInputs {
  DType dtype;
  int64_t rows, width;
  const void* x;  // contiguous
  RmsNorm norm;
  Matrix q, k, v;
  int64_t k_dim, rotated;  // of a query's and key's head, and how much of it is rotated
  RmsNorm q_norm, k_norm;  // of each head, before it is rotated; may be none
  const void *cos, *sin;   // [rows, rotated], contiguous
  void *q_out, *k_out, *v_out;  // [rows, their matrix's out], contiguous
};

// y = h + mlp(norm(h)), where h = x + output(attended).
struct LayerOutputs {
  DType dtype;
  int64_t rows, width;
  const void *x, *attended;  // [rows, width], [rows, q_heads v_dim], contiguous
  int64_t attended_width;
  Matrix output;
  RmsNorm norm;
  Matrix gate, up, down;
  void* y;  // [rows, width], contiguous
};

// y = norm(x) for contiguous rows.
struct RmsNormArgs {
  DType dtype;
  int64_t rows, width;
  const void* x;
  RmsNorm norm;
  void* y;
};

// Heads x [rows, heads, dim] of queries or keys, normed and turned by RoPE where they lie.
struct HeadsArgs {
  DType dtype;
  int64_t rows, heads, dim, rotated;
  void* x;                // contiguous
  RmsNorm norm;           // of each head, before it is rotated; may be none
  const void *cos, *sin;  // [rows, rotated], contiguous
};

// gate = silu(gate) up, `n` elements.
struct GateArgs {
  DType dtype;
  int64_t n;
  void* gate;
  const void* up;
};

// Results depend neither on the number of threads nor on the rows beside a row.
void layer_inputs(const LayerInputs& args, Isa isa, int threads);
void layer_outputs(const LayerOutputs& args, Isa isa, int threads);
void rms_norm(const RmsNormArgs& args, Isa isa, int threads);
void place_heads(const HeadsArgs& args, Isa isa, int threads);
void gate(const GateArgs& args, Isa isa, int threads);

}  // namespace tamis
