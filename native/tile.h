// The number of a tile, as a type: instructions name tiles by constants.
#pragma once

namespace tamis {

template <int n>
struct Tile {};

}  // namespace tamis
