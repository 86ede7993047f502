#include "kernels.h"

namespace tamis {

Kernels kernels(Isa isa) {
  switch (isa) {
#ifdef TAMIS_X86
#ifdef TAMIS_EMULATE_AMX
    case Isa::amx_emulated:
      return kernels_amx_emulated();
#endif
    case Isa::amx:
      return kernels_amx();
    case Isa::avx512_bf16:
      return kernels_avx512_bf16();
    case Isa::avx512:
      return kernels_avx512();
    case Isa::avx2:
      return kernels_avx2();
#endif
    default:
      return kernels_portable();
  }
}

}  // namespace tamis
