#include "tile_product.h"
#include "tiles_emulated.h"

namespace tamis {

Kernels kernels_amx_emulated() { return kernels_by_tiles<EmulatedTiles>(); }

}  // namespace tamis
