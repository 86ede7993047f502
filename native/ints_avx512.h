// Integers with AVX-512 F and BW; see ints_portable.h. A template on the instruction set that uses
// it, because each compiles it with its own instructions.
#pragma once

#include "ints.h"
#include "isa_avx512.h"

namespace tamis {

template <class Isa>
struct Avx512Ints {
  using Vec = __m512i;
  static constexpr int kBytes = 64;

  static Vec zero() { return _mm512_setzero_si512(); }
  static Vec load(const void* from) { return _mm512_loadu_si512(from); }
  static Vec load(const void* from, int64_t bytes) {
    return _mm512_maskz_loadu_epi8((__mmask64{1} << bytes) - 1, from);
  }
  static void store(void* to, Vec v) { _mm512_storeu_si512(to, v); }
  static Vec set16(int16_t x) { return _mm512_set1_epi16(x); }
  // A vector, because shifts by a scalar hold up products where vectors do not.
  using Shift = Vec;
  static Shift shift(int bits) { return set16(static_cast<int16_t>(bits)); }
  static Vec shifted(Vec x, Shift shift) { return _mm512_srlv_epi16(x, shift); }
  static Vec both(Vec a, Vec b) { return _mm512_and_si512(a, b); }
  static Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static Vec low_pairs(Vec a, Vec b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, a, _mm512_slli_epi32(b, 16));
  }
  static Vec high_pairs(Vec a, Vec b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(a, 16), b);
  }
  static Vec dot(Vec sum, Vec a, Vec b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
  static Vec even(Vec a, Vec b) { return _mm512_permutex2var_epi32(a, kEven32.vector(), b); }
  static Vec odd(Vec a, Vec b) { return _mm512_permutex2var_epi32(a, kOdd32.vector(), b); }
  template <int R>
  static Vec join(Vec v) {
    static constexpr Index<int16_t> kOrder = joined_rows(R);
    return _mm512_permutexvar_epi16(kOrder.vector(), v);
  }
  template <int R>
  static Vec repeat(const int16_t* from) {
    if constexpr (R == 1) return load(from);
    if constexpr (R == 2) {
      return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    if constexpr (R == 4) {
      return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    if constexpr (R == 8) {
      int64_t bits;
      __builtin_memcpy(&bits, from, sizeof bits);
      return _mm512_set1_epi64(bits);
    }
    int32_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return _mm512_set1_epi32(bits);
  }
  static __m512 to_float(Vec v) { return _mm512_cvtepi32_ps(v); }
  static Vec bits(__m512 v) { return _mm512_castps_si512(v); }
  static __m512 from_bits(Vec v) { return _mm512_castsi512_ps(v); }
  static __m512 magnitude(__m512 x) {
    return _mm512_castsi512_ps(_mm512_and_si512(bits(x), _mm512_set1_epi32(0x7fffffff)));
  }
  static void store16(int16_t* to, __m512 a, __m512 b, __m512 share) {
    // The low 16 bits of a float whose last bit stands for 1.
    const __m512 one = _mm512_set1_ps(12582912.0f);
    store(to, _mm512_permutex2var_epi16(bits(_mm512_fmadd_ps(a, share, one)), kEven16.vector(),
                                        bits(_mm512_fmadd_ps(b, share, one))));
  }

 private:
  // Which numbers a permutation takes.
  template <class T>
  struct Index {
    alignas(64) T from[kBytes / sizeof(T)];
    Vec vector() const { return load(from); }
  };
  template <class T>
  static constexpr Index<T> every_second(int first) {
    Index<T> index{};
    for (int i = 0; i < static_cast<int>(kBytes / sizeof(T)); ++i) {
      index.from[i] = static_cast<T>(2 * i + first);
    }
    return index;
  }
  static constexpr Index<int16_t> joined_rows(int rows) {
    Index<int16_t> index{};
    for (int i = 0; i < 32; ++i) {
      index.from[i] = static_cast<int16_t>(i % rows * (32 / rows) + i / rows);
    }
    return index;
  }
  static constexpr auto kEven32 = every_second<int32_t>(0), kOdd32 = every_second<int32_t>(1);
  static constexpr auto kEven16 = every_second<int16_t>(0);
};

template <>
struct Ints<Avx512> : Avx512Ints<Avx512> {};

}  // namespace tamis
