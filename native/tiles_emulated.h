// The tiles of tiles_amx.h in plain C++, with the arithmetic that Intel's manual gives for
// TDPBF16PS, for tests on processors without AMX.
#pragma once

#include <cstdint>

#include "element.h"
#include "tile.h"

namespace tamis {

class EmulatedTiles {
  static constexpr int kSide = 16;  // rows of a tile, and units of 4 bytes in a row
  uint32_t tiles_[8][kSide][kSide];

  // As with DAZ and FTZ, which TDPBF16PS implies.
  static float flushed(float x) {
    return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x;
  }
  static float first(uint32_t pair) { return flushed(as_float(pair << 16)); }
  static float second(uint32_t pair) { return flushed(as_float(pair & 0xffff0000u)); }

 public:
  EmulatedTiles() {
    // A tile that is used before it was loaded shows: all bits set are NaNs.
    __builtin_memset(tiles_, 0xff, sizeof tiles_);
  }

  template <int n>
  void zero(Tile<n>) {
    __builtin_memset(tiles_[n], 0, sizeof tiles_[n]);
  }
  template <int n>
  void load(Tile<n>, const void* from, int64_t stride) {
    for (int i = 0; i < kSide; ++i) {
      __builtin_memcpy(tiles_[n][i], static_cast<const uint8_t*>(from) + i * stride,
                       sizeof tiles_[n][i]);
    }
  }
  template <int n>
  void store(Tile<n>, void* to, int64_t stride) {
    for (int i = 0; i < kSide; ++i) {
      __builtin_memcpy(static_cast<uint8_t*>(to) + i * stride, tiles_[n][i], sizeof tiles_[n][i]);
    }
  }
  // Products of first and of second elements are summed apart, with fused multiplications rounded
  // to the nearest, and added to the tile at the end.
  template <int sum, int left, int right>
  void multiply_add(Tile<sum>, Tile<left>, Tile<right>) {
    for (int i = 0; i < kSide; ++i) {
      float firsts[kSide] = {}, seconds[kSide] = {};
      for (int u = 0; u < kSide; ++u) {
        const uint32_t a = tiles_[left][i][u];
        for (int j = 0; j < kSide; ++j) {
          const uint32_t b = tiles_[right][u][j];
          firsts[j] = flushed(__builtin_fmaf(first(a), first(b), firsts[j]));
          seconds[j] = flushed(__builtin_fmaf(second(a), second(b), seconds[j]));
        }
      }
      for (int j = 0; j < kSide; ++j) {
        const float products = flushed(firsts[j] + seconds[j]);
        const float before = flushed(as_float(tiles_[sum][i][j]));
        tiles_[sum][i][j] = as_bits(flushed(before + products));
      }
    }
  }
};

}  // namespace tamis
