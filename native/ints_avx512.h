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
  static Vec plane(Vec x, int shift, Vec mask) {
    return _mm512_and_si512(_mm512_srl_epi16(x, _mm_cvtsi32_si128(shift)), mask);
  }
  static Vec low_pairs(Vec a, Vec b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, a, _mm512_slli_epi32(b, 16));
  }
  static Vec high_pairs(Vec a, Vec b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(a, 16), b);
  }
  static Vec dot(Vec sum, Vec a, Vec b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
  static Vec adjacent(Vec a, Vec b) {
    const Vec even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const Vec odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b),
                            _mm512_permutex2var_epi32(a, odd, b));
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
  static Vec pick(const int16_t* w, const int16_t* index) {
    return _mm512_permutexvar_epi16(load(index), load(w));
  }
  static __m512 to_float(Vec v) { return _mm512_cvtepi32_ps(v); }
  static void store16(int16_t* to, __m512 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
  }
  static __m512 spread(const float* from, int shift) {
    const Vec lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_srl_epi32(lanes, _mm_cvtsi32_si128(shift)),
                                 _mm512_loadu_ps(from));
  }
};

template <>
struct Ints<Avx512> : Avx512Ints<Avx512> {};

}  // namespace tamis
