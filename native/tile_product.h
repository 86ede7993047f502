// Products of matrices of bf16 in tiles of 16 rows of 16 units, by `Tiles`: the registers of AMX
// (tiles_amx.h) or their emulation (tiles_emulated.h).
#pragma once

#include <cstdint>

#include "isa_avx512_bf16.h"
#include "kernels.h"
#include "observe_kernel.h"
#include "packed.h"
#include "prefill_kernel.h"
#include "tile.h"

namespace tamis {

namespace {

// AVX512-BF16, but for the products of matrices.
template <class Tiles>
struct Amx : Avx512Bf16 {};

}  // namespace

// Blocks of 2 x 2 tiles of c: four products for four tiles that are read.
template <class Tiles>
class MatrixProduct<Amx<Tiles>, Bf16> {
  using Unit = PairOuter::Unit;
  static constexpr int64_t kSide = 16;
  static_assert(sizeof(Unit) == 4 && sizeof(float) == 4);

  Tiles tiles_;

 public:
  static constexpr int64_t kRows = kSide;
  static constexpr int64_t kDepth = kSide;
  static_assert(kRows <= kMostRows && Avx512Bf16::kWidth == kSide);

  void multiply(int64_t rows, const Unit* left, int64_t left_stride, const Unit* right,
                int64_t right_stride, int64_t depth, int64_t columns, bool add, float* c,
                int64_t c_stride) {
    const Block block{left, left_stride, right, right_stride, depth, add, c, c_stride};
    int64_t column = 0;
    for (; column + 2 * kSide <= columns; column += 2 * kSide) {
      multiply_columns<2>(block, rows, column);
    }
    if (column < columns) multiply_columns<1>(block, rows, column);
  }

 private:
  struct Block {
    const Unit* left;
    int64_t left_stride;
    const Unit* right;
    int64_t right_stride, depth;
    bool add;
    float* c;
    int64_t c_stride;

    Block at(int64_t row, int64_t column) const {
      return {left + row * left_stride, left_stride, right + column, right_stride, depth, add,
              c + row * c_stride + column, c_stride};
    }
  };

  template <int kAcross>
  void multiply_columns(const Block& block, int64_t rows, int64_t column) {
    int64_t row = 0;
    for (; row + 2 * kSide <= rows; row += 2 * kSide) {
      multiply_block<2, kAcross>(block.at(row, column));
    }
    if (row < rows) multiply_block<1, kAcross>(block.at(row, column));
  }

  // A block of kDown x kAcross tiles: their sums are tiles 0 to 3, their rows 4 and 5, and their
  // columns 6 and 7.
  template <int kDown, int kAcross>
  void multiply_block(const Block& b) {
    const int64_t left_bytes = b.left_stride * 4, right_bytes = b.right_stride * 4;
    const int64_t c_bytes = b.c_stride * 4;
    const auto each_sum = [&](auto visit) {
      visit(Tile<0>{}, Tile<4>{}, Tile<6>{}, b.c);
      if constexpr (kAcross > 1) visit(Tile<1>{}, Tile<4>{}, Tile<7>{}, b.c + kSide);
      if constexpr (kDown > 1) {
        float* const below = b.c + kSide * b.c_stride;
        visit(Tile<2>{}, Tile<5>{}, Tile<6>{}, below);
        if constexpr (kAcross > 1) visit(Tile<3>{}, Tile<5>{}, Tile<7>{}, below + kSide);
      }
    };
    each_sum([&](auto sum, auto, auto, const float* c) {
      if (b.add) {
        tiles_.load(sum, c, c_bytes);
      } else {
        tiles_.zero(sum);
      }
    });
    for (int64_t u = 0; u < b.depth; u += kSide) {
      const Unit* const left = b.left + u;
      const Unit* const right = b.right + u * b.right_stride;
      tiles_.load(Tile<4>{}, left, left_bytes);
      if constexpr (kDown > 1) tiles_.load(Tile<5>{}, left + kSide * b.left_stride, left_bytes);
      tiles_.load(Tile<6>{}, right, right_bytes);
      if constexpr (kAcross > 1) tiles_.load(Tile<7>{}, right + kSide, right_bytes);
      each_sum([&](auto sum, auto rows, auto columns, float*) {
        tiles_.multiply_add(sum, rows, columns);
      });
    }
    each_sum([&](auto sum, auto, auto, float* c) { tiles_.store(sum, c, c_bytes); });
  }
};

// The kernels of AVX512-BF16, those that multiply matrices of bf16 by `Tiles`.
template <class Tiles>
Kernels kernels_by_tiles() {
  constexpr int bf16 = static_cast<int>(DType::bf16);
  Kernels kernels = kernels_avx512_bf16();
  kernels.prefill_tile[bf16] = prefill_tile<Amx<Tiles>, Bf16>;
  kernels.observe_span[bf16] = observe_span<Amx<Tiles>, Bf16>;
  return kernels;
}

}  // namespace tamis
