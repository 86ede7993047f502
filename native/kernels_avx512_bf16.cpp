#include "isa_avx512_bf16.h"
#include "kernels_of.h"

namespace tamis {

Kernels kernels_avx512_bf16() { return kernels_of<Avx512Bf16>(); }

}  // namespace tamis
