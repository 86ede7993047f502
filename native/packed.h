// Matrices packed into units (see FloatOuter in vector_math.h), and their products in tiles of
// registers.
#pragma once

#include <cstdint>

#include "prefill.h"
#include "vector_math.h"

namespace tamis {

// c = left right, or c += left right: left [rows, depth], right [depth, columns]; `rows` is a
// multiple of kRows, `columns` of kWidth, and `depth` of kDepth units; strides of left and right
// are in units. Each row of c is computed alike, whatever the others.
//
// Here by vectors of an instruction set; where a processor multiplies tiles, a specialization does.
// A product lives as long as one call of a kernel: it holds the tiles.
template <class Isa, class T>
class MatrixProduct {
  using Vec = typename Isa::Vec;
  using Outer = typename Isa::template Outer<T>;
  using Unit = typename Outer::Unit;
  static constexpr int64_t kWidth = Isa::kWidth;

 public:
  static constexpr int64_t kRows = 6;
  static constexpr int64_t kDepth = 1;
  static_assert(kRows <= kMostRows);

  void multiply(int64_t rows, const Unit* left, int64_t left_stride, const Unit* right,
                int64_t right_stride, int64_t depth, int64_t columns, bool add, float* c,
                int64_t c_stride) {
    constexpr int kVectors = Isa::kTileVectors;
    int64_t column = 0;
    for (; column + kVectors * kWidth <= columns; column += kVectors * kWidth) {
      multiply_columns<kVectors>(rows, left, left_stride, right + column, right_stride, depth, add,
                                 c + column, c_stride);
    }
    for (; column < columns; column += kWidth) {
      multiply_columns<1>(rows, left, left_stride, right + column, right_stride, depth, add,
                          c + column, c_stride);
    }
  }

 private:
  template <int kVectors>
  static void multiply_columns(int64_t whole_rows, const Unit* left, int64_t left_stride,
                               const Unit* right, int64_t right_stride, int64_t depth, bool add,
                               float* c, int64_t c_stride) {
    for (int64_t r = 0; r < whole_rows; r += kRows) {
      const Unit* const rows = left + r * left_stride;
      float* const out = c + r * c_stride;
      Vec total[kRows][kVectors];
      for (int i = 0; i < kRows; ++i) {
        for (int n = 0; n < kVectors; ++n) {
          total[i][n] = add ? Isa::load(out + i * c_stride + n * kWidth) : Isa::set(0.0f);
        }
      }
      for (int64_t u = 0; u < depth; ++u) {
        typename Outer::Lanes columns[kVectors];
        for (int n = 0; n < kVectors; ++n) {
          columns[n] = Outer::load(right + u * right_stride + n * kWidth);
        }
        for (int i = 0; i < kRows; ++i) {
          const auto row = Outer::broadcast(rows + i * left_stride + u);
          for (int n = 0; n < kVectors; ++n) {
            total[i][n] = Outer::multiply_add(total[i][n], row, columns[n]);
          }
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int n = 0; n < kVectors; ++n) {
          Isa::store(out + i * c_stride + n * kWidth, total[i][n]);
        }
      }
    }
  }
};

template <class Isa, class T>
struct Packed {
  using Outer = typename Isa::template Outer<T>;
  using Unit = typename Outer::Unit;
  using Product = MatrixProduct<Isa, T>;
  static constexpr int64_t kWidth = Isa::kWidth;
  static constexpr int64_t kPack = Outer::kPack;

  static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

  // `rows` to whole tiles.
  static int64_t whole_rows(int64_t rows) { return round_up(rows, Product::kRows); }

  // The depth in units, to whole tiles, of `dim` elements.
  static int64_t units(int64_t dim) { return round_up(present_units(dim), Product::kDepth); }

  // One row of a left matrix, zeros past `dim`.
  static void pack_row(const T* row, int64_t dim, Unit* to) {
    for (int64_t i = 0; i < dim; i += kPack) to[i / kPack] = pack(row, i, dim);
    for (int64_t u = present_units(dim); u < units(dim); ++u) to[u] = Unit{};
  }

  // `count` rows of `dim` elements as the columns of a right matrix, a vector's width of them at a
  // time so that whole cache lines are written; zeros to whole vectors and past `dim`.
  static void pack_columns(const T* const* rows, int64_t count, int64_t dim, Unit* to,
                           int64_t stride) {
    for (int64_t first = 0; first < count; first += kWidth) {
      const int64_t present = count - first < kWidth ? count - first : kWidth;
      int64_t i = 0;
      if constexpr (Isa::kTransposes) {
        for (; i + kWidth * kPack <= dim; i += kWidth * kPack) {
          pack_square(rows + first, present, i, to + i / kPack * stride + first, stride);
        }
      }
      for (; i < dim; i += kPack) {
        Unit* const units = to + i / kPack * stride + first;
        for (int64_t j = 0; j < present; ++j) units[j] = pack(rows[first + j], i, dim);
        for (int64_t j = present; j < kWidth; ++j) units[j] = Unit{};
      }
    }
    zero_rows(to, stride, present_units(dim), units(dim), round_up(count, kWidth));
  }

  // `count` rows of `dim` elements as the rows of a right matrix: zeros from `dim` to `stride`, and
  // in rows past `count`. To a whole unit the last row is repeated, so the left matrix must be zero
  // there.
  static void pack_rows(const T* const* rows, int64_t count, int64_t dim, Unit* to,
                        int64_t stride) {
    for (int64_t j = 0; j < count; j += kPack) {
      Unit* const units = to + j / kPack * stride;
      const T* unit_rows[kPack];
      for (int64_t n = 0; n < kPack; ++n) unit_rows[n] = rows[j + n < count ? j + n : count - 1];
      for (int64_t d = Outer::pack_rows(unit_rows, dim, units); d < dim; ++d) {
        T elements[kPack];
        for (int64_t n = 0; n < kPack; ++n) elements[n] = unit_rows[n][d];
        units[d] = Outer::pack(elements);
      }
      for (int64_t d = dim; d < stride; ++d) units[d] = Unit{};
    }
    zero_rows(to, stride, present_units(count), units(count), stride);
  }

 private:
  // A vector's width of units from element `i` on of `present` rows, as columns.
  static void pack_square(const T* const* rows, int64_t present, int64_t i, Unit* to,
                          int64_t stride) {
    typename Isa::Vec units[kWidth];
    for (int64_t j = 0; j < kWidth; ++j) {
      units[j] = j < present ? Outer::units(rows[j] + i) : Isa::set(0.0f);
    }
    Isa::transpose(units);
    for (int64_t j = 0; j < kWidth; ++j) __builtin_memcpy(to + j * stride, units + j, sizeof *units);
  }

  static int64_t present_units(int64_t dim) { return (dim + kPack - 1) / kPack; }

  // Rows first..last of a right matrix, to `columns`.
  static void zero_rows(Unit* matrix, int64_t stride, int64_t first, int64_t last,
                        int64_t columns) {
    for (int64_t u = first; u < last; ++u) {
      for (int64_t j = 0; j < columns; ++j) matrix[u * stride + j] = Unit{};
    }
  }

  // Element `i` of a row and its successors that share a unit, zeros past `count`.
  static Unit pack(const T* row, int64_t i, int64_t count) {
    if (i + kPack <= count) return Outer::pack(row + i);
    T elements[kPack] = {};
    for (int64_t n = 0; i + n < count; ++n) elements[n] = row[i + n];
    return Outer::pack(elements);
  }
};

}  // namespace tamis
