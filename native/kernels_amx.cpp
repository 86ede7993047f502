#include "tile_product.h"
#include "tiles_amx.h"

namespace tamis {

Kernels kernels_amx() { return kernels_by_tiles<HardwareTiles>(); }

}  // namespace tamis
