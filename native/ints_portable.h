// Integers in the compiler's own vector types: any processor.
#pragma once

#include "ints.h"
#include "isa_portable.h"

namespace tamis {

template <>
struct Ints<Portable> {
  typedef int32_t Vec __attribute__((vector_size(16)));
  typedef int16_t Halves __attribute__((vector_size(16)));
  typedef uint16_t Words __attribute__((vector_size(16)));
  static constexpr int kBytes = 16;

  static Vec zero() { return Vec{}; }
  static Vec load(const void* from) {
    Vec v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }
  // The first `bytes` bytes, zero behind them.
  static Vec load(const void* from, int64_t bytes) {
    Vec v{};
    __builtin_memcpy(&v, from, bytes);
    return v;
  }
  static void store(void* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }
  static Vec set16(int16_t x) { return reinterpret_cast<Vec>(Halves{x, x, x, x, x, x, x, x}); }
  // Per 16 bits: (x >> shift) & mask.
  static Vec plane(Vec x, int shift, Vec mask) {
    return reinterpret_cast<Vec>(reinterpret_cast<Words>(x) >> static_cast<uint16_t>(shift)) & mask;
  }
  // Per 32 bits: the low (or high) 16 bits of a, above them those of b.
  static Vec low_pairs(Vec a, Vec b) { return (a & 0xffff) | (b << 16); }
  static Vec high_pairs(Vec a, Vec b) { return ((a >> 16) & 0xffff) | (b & ~0xffff); }
  // Per 32 bits: sum + the products of both 16-bit numbers.
  static Vec dot(Vec sum, Vec a, Vec b) {
    const Halves x = reinterpret_cast<Halves>(a), y = reinterpret_cast<Halves>(b);
    for (int i = 0; i < 4; ++i) sum[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    return sum;
  }
  // Sums of neighbours: those of a, then those of b.
  static Vec adjacent(Vec a, Vec b) {
    return Vec{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
  }
  // The kBytes / R bytes at `from`, R times.
  template <int R>
  static Vec repeat(const int16_t* from) {
    Vec v;
    for (int i = 0; i < R; ++i) {
      __builtin_memcpy(reinterpret_cast<char*>(&v) + i * (kBytes / R), from, kBytes / R);
    }
    return v;
  }
  // Lane i holds w[index[2 i]] and w[index[2 i + 1]].
  static Vec pick(const int16_t* w, const int16_t* index) {
    Halves v{};
    for (int i = 0; i < 8; ++i) v[i] = w[index[i]];
    return reinterpret_cast<Vec>(v);
  }
  static Portable::Vec to_float(Vec v) { return __builtin_convertvector(v, Portable::Vec); }
  // Round to the nearest 16-bit integers.
  static void store16(int16_t* to, Portable::Vec v) {
    const Portable::Vec whole = Portable::round(v);
    for (int i = 0; i < 4; ++i) to[i] = static_cast<int16_t>(static_cast<int32_t>(whole[i]));
  }
  // Lane i is from[i >> shift].
  static Portable::Vec spread(const float* from, int shift) {
    Portable::Vec v{};
    for (int i = 0; i < 4; ++i) v[i] = from[i >> shift];
    return v;
  }
};

}  // namespace tamis
