#include "ints_avx2.h"
#include "kernels_of.h"

namespace tamis {

Kernels kernels_avx2() { return kernels_of<Avx2>(); }

}  // namespace tamis
