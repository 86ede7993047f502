// The table of kernels of one instruction set `Isa` (isa_*.h).
#pragma once

#include "decode_kernel.h"
#include "encoded_kernel.h"
#include "kernels.h"
#include "linear_kernel.h"
#include "nearest_kernel.h"
#include "observe_kernel.h"
#include "observe_pages_kernel.h"
#include "observe_tokens_kernel.h"
#include "prefill_kernel.h"
#include "quantize_kernel.h"
#include "rotate_kernel.h"
#include "rows_kernel.h"

namespace tamis {

template <class Isa>
Kernels kernels_of() {
  return {{attend_range<Isa, float>, attend_range<Isa, Fp16>, attend_range<Isa, Bf16>},
          {prefill_tile<Isa, float>, prefill_tile<Isa, Fp16>, prefill_tile<Isa, Bf16>},
          {observe_span<Isa, float>, observe_span<Isa, Fp16>, observe_span<Isa, Bf16>},
          {observe_range<Isa, float>, observe_range<Isa, Fp16>, observe_range<Isa, Bf16>},
          {linear_range<Isa, float>, linear_range<Isa, Fp16>, linear_range<Isa, Bf16>},
          {linear_range<Isa, float, Int8>, linear_range<Isa, Fp16, Int8>,
           linear_range<Isa, Bf16, Int8>},
          {rms_norm_row<Isa, float>, rms_norm_row<Isa, Fp16>, rms_norm_row<Isa, Bf16>},
          {rotate_row<Isa, float>, rotate_row<Isa, Fp16>, rotate_row<Isa, Bf16>},
          {gate_row<Isa, float>, gate_row<Isa, Fp16>, gate_row<Isa, Bf16>},
          {add_row<Isa, float>, add_row<Isa, Fp16>, add_row<Isa, Bf16>},
          {bound_pages<Isa, float>, bound_pages<Isa, Fp16>, bound_pages<Isa, Bf16>},
          softmax_row<Isa>,
          attend_encoded<Isa>,
          {quantize_range<Isa, float>, quantize_range<Isa, Fp16>, quantize_range<Isa, Bf16>},
          {rotate_key<Isa, float>, rotate_key<Isa, Fp16>, rotate_key<Isa, Bf16>},
          {nearest_range<Isa, float>, nearest_range<Isa, Fp16>, nearest_range<Isa, Bf16>}};
}

}  // namespace tamis
