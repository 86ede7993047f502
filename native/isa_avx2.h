// Vectors of 8 floats with AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "vector_math.h"

namespace tamis {

struct Avx2 {
  static constexpr int kWidth = 8;
  static constexpr int kTileVectors = 2;  // columns of a tile of 6 rows that fits registers
  static constexpr bool kTransposes = false;  // kWidth vectors
  using Vec = __m256;

  template <class T>
  using Dot = FloatDot<Avx2, T>;
  template <class T>
  using Outer = FloatOuter<Avx2, T>;

  static Vec set(float x) { return _mm256_set1_ps(x); }
  static Vec load(const float* from) { return _mm256_loadu_ps(from); }
  static Vec load(const Bf16* from) { return widen(load_halves(from), Bf16{}); }
  static Vec load(const Fp16* from) { return widen(load_halves(from), Fp16{}); }
  static Vec load(const Int8* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  template <class T>
  static Vec load(const T* from, int64_t count) {
    T whole[kWidth] = {};
    __builtin_memcpy(whole, from, count * sizeof(T));
    return load(whole);
  }
  static void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
  template <class Half>
  static void store(Half* to, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow(v, Half{}));
  }
  template <class T>
  static void store(T* to, Vec v, int64_t count) {
    T whole[kWidth];
    store(whole, v);
    __builtin_memcpy(to, whole, count * sizeof(T));
  }
  // Each lane as an element of that type holds it.
  static Vec rounded(Vec v, float) { return v; }
  template <class Half>
  static Vec rounded(Vec v, Half type) {
    return widen(narrow(v, type), type);
  }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // The second operand where either is NaN.
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static Vec round(Vec v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // x 2^n for whole n in [-126, 126].
  static Vec scale(Vec x, Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  // Zero where `x` is less than `limit`, else `v`.
  static Vec zero_below(Vec v, Vec x, float limit) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, set(limit), _CMP_LT_OQ), v);
  }
  static float first_lane(Vec v) { return _mm256_cvtss_f32(v); }
  static float sum_lanes(Vec v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static float max_lane(Vec v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  // Lane i is the sum of the lanes of v[i].
  static Vec sums(const Vec* v) {
    const Vec low = sums_of_four(v), high = sums_of_four(v + 4);
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                         _mm256_permute2f128_ps(low, high, 0x31));
  }

 private:
  static __m128i load_halves(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
  static Vec widen(__m128i halves, Bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static Vec widen(__m128i halves, Fp16) { return _mm256_cvtph_ps(halves); }
  // To nearest, ties to even; as element.h rounds, subnormal numbers too.
  static __m128i narrow(Vec v, Bf16) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(_mm256_add_epi32(bits, half), quiet, nan);
    const __m256i high = _mm256_srli_epi32(kept, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  static __m128i narrow(Vec v, Fp16) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // Per 128-bit half: lane i is the sum of that half of v[i].
  static Vec sums_of_four(const Vec* v) {
    return _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  }
};

}  // namespace tamis
