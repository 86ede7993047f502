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
  static Vec plane(Vec x, int shift, Vec mask) {
    return _mm256_and_si256(_mm256_srl_epi16(x, _mm_cvtsi32_si128(shift)), mask);
  }
  static Vec low_pairs(Vec a, Vec b) {
    return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
  }
  static Vec high_pairs(Vec a, Vec b) {
    return _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
  }
  static Vec dot(Vec sum, Vec a, Vec b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static Vec adjacent(Vec a, Vec b) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
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
  static Vec pick(const int16_t* w, const int16_t* index) {
    int16_t picked[16];
    for (int i = 0; i < 16; ++i) picked[i] = w[index[i]];
    return load(picked);
  }
  static __m256 to_float(Vec v) { return _mm256_cvtepi32_ps(v); }
  static void store16(int16_t* to, __m256 v) {
    const __m256i whole = _mm256_cvtps_epi32(v);
    const __m256i halves = _mm256_packs_epi32(whole, whole);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08)));
  }
  static __m256 spread(const float* from, int shift) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(from),
                                    _mm256_srl_epi32(lanes, _mm_cvtsi32_si128(shift)));
  }
};

}  // namespace tamis
