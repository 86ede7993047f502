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
  // A shift by so many bits, which is the same for all.
  using Shift = uint16_t;
  static Shift shift(int bits) { return static_cast<uint16_t>(bits); }
  // Per 16 bits: x >> shift.
  static Vec shifted(Vec x, Shift shift) {
    return reinterpret_cast<Vec>(reinterpret_cast<Words>(x) >> shift);
  }
  static Vec both(Vec a, Vec b) { return a & b; }
  static Vec add(Vec a, Vec b) { return a + b; }
  // Per 32 bits: the low (or high) 16 bits of a, above them those of b.
  static Vec low_pairs(Vec a, Vec b) { return (a & 0xffff) | (b << 16); }
  static Vec high_pairs(Vec a, Vec b) { return ((a >> 16) & 0xffff) | (b & ~0xffff); }
  // Per 32 bits: sum + the products of both 16-bit numbers.
  static Vec dot(Vec sum, Vec a, Vec b) {
    const Halves x = reinterpret_cast<Halves>(a), y = reinterpret_cast<Halves>(b);
    for (int i = 0; i < 4; ++i) sum[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    return sum;
  }
  // Every second 32-bit number of a, then of b, from the first or the second one on.
  static Vec even(Vec a, Vec b) { return Vec{a[0], a[2], b[0], b[2]}; }
  static Vec odd(Vec a, Vec b) { return Vec{a[1], a[3], b[1], b[3]}; }
  // Of R rows of 16-bit numbers, which lie one after the other, the first numbers, then the second
  // ones, and so on.
  template <int R>
  static Vec join(Vec v) {
    for (int rows = R; rows > 1; rows /= 2) {
      const Halves x = reinterpret_cast<Halves>(v);
      v = reinterpret_cast<Vec>(Halves{x[0], x[4], x[1], x[5], x[2], x[6], x[3], x[7]});
    }
    return v;
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
  static Portable::Vec to_float(Vec v) { return __builtin_convertvector(v, Portable::Vec); }
  static Vec bits(Portable::Vec v) { return reinterpret_cast<Vec>(v); }
  static Portable::Vec from_bits(Vec v) { return reinterpret_cast<Portable::Vec>(v); }
  // |x|, and NaN of NaN.
  static Portable::Vec magnitude(Portable::Vec x) {
    return reinterpret_cast<Portable::Vec>(bits(x) & 0x7fffffff);
  }
  // Round a share, then b share, to the nearest 16-bit integers.
  static void store16(int16_t* to, Portable::Vec a, Portable::Vec b, Portable::Vec share) {
    const Vec low = rounded(a, share), high = rounded(b, share);
    for (int i = 0; i < 4; ++i) {
      to[i] = static_cast<int16_t>(low[i]);
      to[4 + i] = static_cast<int16_t>(high[i]);
    }
  }

 private:
  // a share, rounded, in the low 16 bits: those of a float whose last bit stands for 1.
  static Vec rounded(Portable::Vec a, Portable::Vec share) {
    return bits(Portable::fma(a, share, Portable::set(12582912.0f)));
  }
};

}  // namespace tamis
