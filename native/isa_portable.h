// Vectors of 4 floats in the compiler's own vector type: any processor.
#pragma once

#include "vector_math.h"

namespace tamis {

struct Portable {
  static constexpr int kWidth = 4;
  static constexpr int kTileVectors = 2;  // columns of a tile of 6 rows that fits registers
  static constexpr bool kTransposes = false;  // kWidth vectors
  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));

  template <class T>
  using Dot = FloatDot<Portable, T>;
  template <class T>
  using Outer = FloatOuter<Portable, T>;

  static Vec set(float x) { return Vec{x, x, x, x}; }
  template <class T>
  static Vec load(const T* from, int64_t count = kWidth) {
    Vec v{};
    for (int i = 0; i < count; ++i) v[i] = to_float(from[i]);
    return v;
  }
  static void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }
  template <class T>
  static void store(T* to, Vec v, int64_t count = kWidth) {
    for (int i = 0; i < count; ++i) from_float(v[i], to + i);
  }
  // Each lane as an element of that type holds it.
  template <class T>
  static Vec rounded(Vec v, T type) {
    for (int i = 0; i < kWidth; ++i) {
      from_float(v[i], &type);
      v[i] = to_float(type);
    }
    return v;
  }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  // As on x86, the second operand where either is NaN.
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static Vec min(Vec a, Vec b) { return a < b ? a : b; }
  static Vec round(Vec v) {
    // Adding 1.5 * 2^23 leaves no fractional bits for |v| < 2^22.
    const Vec shift = set(12582912.0f);
    return (v + shift) - shift;
  }
  // x 2^n for whole n in [-126, 126].
  static Vec scale(Vec x, Vec n) {
    const Int exponent = (__builtin_convertvector(n, Int) + 127) << 23;
    return x * reinterpret_cast<Vec>(exponent);
  }
  // Zero where `x` is less than `limit`, else `v`.
  static Vec zero_below(Vec v, Vec x, float limit) { return x < set(limit) ? Vec{} : v; }
  static float first_lane(Vec v) { return v[0]; }
  static float sum_lanes(Vec v) {
    float sum = 0.0f;
    for (int i = 0; i < kWidth; ++i) sum += v[i];
    return sum;
  }
  static float max_lane(Vec v) {
    float top = v[0];
    for (int i = 1; i < kWidth; ++i) top = v[i] > top ? v[i] : top;
    return top;
  }
  // Lane i is the sum of the lanes of v[i].
  static Vec sums(const Vec* v) {
    Vec out{};
    for (int i = 0; i < kWidth; ++i) out[i] = sum_lanes(v[i]);
    return out;
  }
};

}  // namespace tamis
