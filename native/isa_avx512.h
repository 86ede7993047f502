// Vectors of 16 floats with AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "vector_math.h"

namespace tamis {

struct Avx512 {
  static constexpr int kWidth = 16;
  static constexpr int kTileVectors = 4;  // columns of a tile of 6 rows that fits registers
  static constexpr bool kTransposes = true;  // kWidth vectors
  using Vec = __m512;

  template <class T>
  using Dot = FloatDot<Avx512, T>;
  template <class T>
  using Outer = FloatOuter<Avx512, T>;

  static Vec set(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* from) { return _mm512_loadu_ps(from); }
  static Vec load(const Bf16* from) { return widen(load_halves(from), Bf16{}); }
  static Vec load(const Fp16* from) { return widen(load_halves(from), Fp16{}); }
  static Vec load(const Int8* from) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Vec load(const Int8* from, int64_t count) {
    return widen(_mm_maskz_loadu_epi8(first(count), from));
  }
  static Vec load(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(first(count), from);
  }
  template <class Half>
  static Vec load(const Half* from, int64_t count) {
    return widen(_mm256_maskz_loadu_epi16(first(count), from), Half{});
  }
  static void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
  static void store(float* to, Vec v, int64_t count) {
    _mm512_mask_storeu_ps(to, first(count), v);
  }
  template <class Half>
  static void store(Half* to, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(v, Half{}));
  }
  template <class Half>
  static void store(Half* to, Vec v, int64_t count) {
    _mm256_mask_storeu_epi16(to, first(count), narrow(v, Half{}));
  }
  // Each lane as an element of that type holds it.
  static Vec rounded(Vec v, float) { return v; }
  template <class Half>
  static Vec rounded(Vec v, Half type) {
    return widen(narrow(v, type), type);
  }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  // The second operand where either is NaN.
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static Vec round(Vec v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // x 2^n for whole n in [-126, 126].
  static Vec scale(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
  // Zero where `x` is less than `limit`, else `v`.
  static Vec zero_below(Vec v, Vec x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set(limit), _CMP_NLT_UQ), v);
  }
  static float first_lane(Vec v) { return _mm512_cvtss_f32(v); }
  static float sum_lanes(Vec v) { return _mm512_reduce_add_ps(v); }
  static float max_lane(Vec v) { return _mm512_reduce_max_ps(v); }
  // Lane i is the sum of the lanes of v[i].
  static Vec sums(const Vec* v) {
    const Vec low = add_quarters(sums_of_four(v), sums_of_four(v + 4));
    const Vec high = add_quarters(sums_of_four(v + 8), sums_of_four(v + 12));
    return add_quarters(low, high);
  }
  // v[i] lane j becomes v[j] lane i.
  static void transpose(Vec* v) {
    Vec t[16];
    for (int i = 0; i < 16; i += 4) {  // 4 x 4 blocks within quarters of four vectors
      const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[i], v[i + 1]));
      const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[i], v[i + 1]));
      const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[i + 2], v[i + 3]));
      const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[i + 2], v[i + 3]));
      t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
      t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
      t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
      t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    for (int i = 0; i < 4; ++i) {  // and the blocks themselves
      const Vec a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
      const Vec b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
      const Vec c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
      const Vec d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
      v[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      v[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
      v[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
      v[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }

 private:
  static __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
  static __m256i load_halves(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static Vec widen(__m256i halves, Bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static Vec widen(__m256i halves, Fp16) { return _mm512_cvtph_ps(halves); }
  // To nearest, ties to even; as element.h rounds, subnormal numbers too.
  static __m256i narrow(Vec v, Bf16) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i nearest = _mm512_add_epi32(bits, half);
    const __m512i kept = _mm512_mask_or_epi32(nearest, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
  static __m256i narrow(Vec v, Fp16) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Vec widen(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
  // Per 128-bit quarter: lane i is the sum of that quarter of v[i].
  static Vec sums_of_four(const Vec* v) {
    const __m512d a = _mm512_castps_pd(add_pairs(v[0], v[1]));
    const __m512d b = _mm512_castps_pd(add_pairs(v[2], v[3]));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  static Vec add_pairs(Vec a, Vec b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  // [a0 + a1, a2 + a3, b0 + b1, b2 + b3] over 128-bit quarters.
  static Vec add_quarters(Vec a, Vec b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
};

}  // namespace tamis
