#include "ints_portable.h"
#include "kernels_of.h"

namespace tamis {

Kernels kernels_portable() { return kernels_of<Portable>(); }

}  // namespace tamis
