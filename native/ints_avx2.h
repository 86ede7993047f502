// Integers with AVX2; see ints_portable.h.
#pragma once

#include "ints.h"
#include "isa_avx2.h"

namespace tamis {

template <>
struct Ints<Avx2> {
  using Vec = __m256i;
  static constexpr int kBytes = 32;

  static Vec zero() { return _mm256_setzero_si256(); }
  static Vec load(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static Vec load(const void* from, int64_t bytes) {
    Vec v = zero();
    __builtin_memcpy(&v, from, bytes);
    return v;
  }
  static void store(void* to, Vec v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
  static Vec set16(int16_t x) { return _mm256_set1_epi16(x); }
  using Shift = __m128i;
  static Shift shift(int bits) { return _mm_cvtsi32_si128(bits); }
  static Vec shifted(Vec x, Shift shift) { return _mm256_srl_epi16(x, shift); }
  static Vec both(Vec a, Vec b) { return _mm256_and_si256(a, b); }
  static Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static Vec low_pairs(Vec a, Vec b) {
    return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
  }
  static Vec high_pairs(Vec a, Vec b) {
    return _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
  }
  static Vec dot(Vec sum, Vec a, Vec b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static Vec even(Vec a, Vec b) { return joined(shuffled<0x88>(a, b)); }
  static Vec odd(Vec a, Vec b) { return joined(shuffled<0xdd>(a, b)); }
  template <int R>
  static Vec join(Vec v) {
    for (int rows = R; rows > 1; rows /= 2) {
      const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
      v = _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
    }
    return v;
  }
  template <int R>
  static Vec repeat(const int16_t* from) {
    if constexpr (R == 1) return load(from);
    if constexpr (R == 2) {
      return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    if constexpr (R == 4) {
      int64_t bits;
      __builtin_memcpy(&bits, from, sizeof bits);
      return _mm256_set1_epi64x(bits);
    }
    int32_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return _mm256_set1_epi32(bits);
  }
  static __m256 to_float(Vec v) { return _mm256_cvtepi32_ps(v); }
  static Vec bits(__m256 v) { return _mm256_castps_si256(v); }
  static __m256 from_bits(Vec v) { return _mm256_castsi256_ps(v); }
  static __m256 magnitude(__m256 x) {
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
  }
  static void store16(int16_t* to, __m256 a, __m256 b, __m256 share) {
    store(to, joined(_mm256_packs_epi32(_mm256_cvtps_epi32(a * share),
                                        _mm256_cvtps_epi32(b * share))));
  }

 private:
  template <int kChosen>
  static Vec shuffled(Vec a, Vec b) {
    return bits(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), kChosen));
  }
  // What two halves of vectors hold of a and b each: that of a, then that of b.
  static Vec joined(Vec halves) { return _mm256_permute4x64_epi64(halves, 0xd8); }
};

}  // namespace tamis
