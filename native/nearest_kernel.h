// The kernel of nearest.h, written once over an instruction set `Isa` (isa_*.h): products of matrices
// tile by tile, of which only the largest per key is kept.
#pragma once

#include "nearest.h"
#include "packed.h"

namespace tamis {

template <class Isa, class T>
void nearest_range(const NearestArgs& args, int64_t begin, int64_t end, float* scratch) {
  using Matrix = Packed<Isa, T>;
  using Unit = typename Matrix::Unit;
  using Vec = typename Isa::Vec;
  constexpr int64_t kColumns = kNearestColumns, kWidth = Isa::kWidth;
  static_assert(kNearestRows % Matrix::Product::kRows == 0);
  const int64_t rows = end - begin, units = Matrix::units(args.dim);
  const T* const keys = static_cast<const T*>(args.keys);
  const T* const others = static_cast<const T*>(args.others);

  float* const products = scratch;  // [kNearestRows, kColumns]
  Unit* const left = reinterpret_cast<Unit*>(products + kNearestRows * kColumns);
  Unit* const right = left + kNearestRows * units;  // [units, kColumns]
  for (int64_t r = 0; r < Matrix::whole_rows(rows); ++r) {
    Matrix::pack_row(keys + (begin + (r < rows ? r : 0)) * args.dim, args.dim, left + r * units);
  }
  float best[kNearestRows];
  for (int64_t r = 0; r < rows; ++r) {
    best[r] = -__builtin_inff();
    args.index[begin + r] = 0;
  }
  typename Matrix::Product product;
  for (int64_t first = 0; first < args.among; first += kColumns) {
    const int64_t count = args.among - first < kColumns ? args.among - first : kColumns;
    const T* columns[kColumns];
    float scales[kColumns] = {};
    for (int64_t j = 0; j < count; ++j) {
      columns[j] = others + (first + j) * args.dim;
      scales[j] = args.other_scales[first + j];
    }
    Matrix::pack_columns(columns, count, args.dim, right, kColumns);
    const int64_t padded = Matrix::round_up(count, kWidth);
    product.multiply(Matrix::whole_rows(rows), left, units, right, kColumns, units, padded, false,
                     products, kColumns);
    for (int64_t r = 0; r < rows; ++r) {
      float* const of_row = products + r * kColumns;
      Vec tops = Isa::set(-__builtin_inff());
      for (int64_t j = 0; j < padded; j += kWidth) {
        const Vec scaled = Isa::load(of_row + j) * Isa::load(scales + j);
        Isa::store(of_row + j, scaled);
        if (j + kWidth <= count) tops = Isa::max(tops, scaled);
      }
      float top = Isa::max_lane(tops);
      for (int64_t j = count / kWidth * kWidth; j < count; ++j) {
        top = of_row[j] > top ? of_row[j] : top;
      }
      if (!(top > best[r])) continue;
      best[r] = top;
      for (int64_t j = count - 1; j >= 0; --j) {
        if (of_row[j] == top) args.index[begin + r] = first + j;
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    args.similarity[begin + r] = best[r] * args.key_scales[begin + r];
  }
}

}  // namespace tamis
