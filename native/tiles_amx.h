// The tile registers of AMX: 8 of 16 rows of 64 bytes.
//
// Written in assembly: GCC 12's intrinsics do not tell the compiler that a load reads memory, so
// that it may move the stores of what is loaded behind it; and they take only literal numbers.
#pragma once

#include <cstdint>

#include "tile.h"

namespace tamis {

class HardwareTiles {
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static_assert(sizeof(Configuration) == 64);

 public:
  // The tiles are the thread's: other libraries that use them configure them in turn, so they are
  // configured for one object's life and then given back, which also lets the processor rest.
  HardwareTiles() {
    const Configuration configuration;
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~HardwareTiles() { asm volatile("tilerelease" : : : "memory"); }
  HardwareTiles(const HardwareTiles&) = delete;
  HardwareTiles& operator=(const HardwareTiles&) = delete;

  template <int n>
  void zero(Tile<n>) {
    asm volatile("tilezero %%tmm%c0" : : "i"(n));
  }
  // 16 rows of 64 bytes, `stride` bytes apart.
  template <int n>
  void load(Tile<n>, const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(n) : "memory");
  }
  template <int n>
  void store(Tile<n>, void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(n) : "memory");
  }
  // sum += left right, of pairs of bf16 along the depth.
  template <int sum, int left, int right>
  void multiply_add(Tile<sum>, Tile<left>, Tile<right>) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right));
  }
};

}  // namespace tamis
