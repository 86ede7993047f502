// The kernels that are compiled once per instruction set.
#pragma once

#include "cpu.h"
#include "decode.h"
#include "encoded.h"
#include "linear.h"
#include "nearest.h"
#include "observe.h"
#include "observe_pages.h"
#include "observe_tokens.h"
#include "prefill.h"
#include "quantize.h"
#include "rotate.h"
#include "rows.h"

namespace tamis {

// Arrays are by element type: index with static_cast<int>(DType).
struct Kernels {
  AttendRange* attend_range[3];
  PrefillTile* prefill_tile[3];
  ObserveSpan* observe_span[3];
  ObserveRange* observe_range[3];
  LinearRange* linear_range[3];
  LinearRange* linear_int8_range[3];
  RmsNormRow* rms_norm_row[3];
  RotateRow* rotate_row[3];
  GateRow* gate_row[3];
  AddRow* add_row[3];
  BoundPages* bound_pages[3];
  SoftmaxRow* softmax_row;
  AttendEncoded* attend_encoded;
  QuantizeRange* quantize_range[3];
  RotateKey* rotate_key[3];
  NearestRange* nearest_range[3];
};

Kernels kernels_portable();
Kernels kernels_avx2();
Kernels kernels_avx512();
Kernels kernels_avx512_bf16();
Kernels kernels_amx();
Kernels kernels_amx_emulated();

// The kernels of `isa`, which this machine must run.
Kernels kernels(Isa isa);

}  // namespace tamis
