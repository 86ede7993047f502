#include "ints_avx512.h"
#include "kernels_of.h"

namespace tamis {

Kernels kernels_avx512() { return kernels_of<Avx512>(); }

}  // namespace tamis
