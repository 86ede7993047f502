// AVX-512 with products of pairs of bf16 (AVX512-BF16), and with VNNI.
#pragma once

#include "ints_avx512.h"

namespace tamis {
namespace {

using Lanes = __m512bh;  // 16 pairs of bf16

Lanes lanes(__m512i bits) { return reinterpret_cast<Lanes>(bits); }

// Inner products of bf16 with bf16: 32 exact products, added in pairs in fp32.
struct PairDot {
  using Query = Bf16;
  using Lanes = tamis::Lanes;
  static constexpr int64_t kStep = 32;

  static Query query(Bf16 value) { return value; }
  static Lanes load(const Bf16* from) { return lanes(_mm512_loadu_si512(from)); }
  static Lanes load(const Bf16* from, int64_t count) {
    return lanes(_mm512_maskz_loadu_epi16((1u << count) - 1, from));
  }
  static Lanes load(const Int8* from) {
    return joined(Avx512::load(from), Avx512::load(from + 16));
  }
  static Lanes load(const Int8* from, int64_t count) {
    const int64_t low = count < 16 ? count : 16;
    return joined(Avx512::load(from, low), Avx512::load(from + low, count - low));
  }
  static __m512 multiply_add(__m512 sum, Lanes query, Lanes key) {
    return _mm512_dpbf16_ps(sum, query, key);
  }

 private:
  static Lanes joined(__m512 low, __m512 high) { return _mm512_cvtne2ps_pbh(high, low); }
};

// Products of matrices of bf16, two along the depth per unit (see FloatOuter).
struct PairOuter {
  struct Unit {
    Bf16 first, second;
  };
  using Lanes = tamis::Lanes;
  static constexpr int kPack = 2;

  static Unit pack(const Bf16* elements) { return {elements[0], elements[1]}; }
  static Lanes broadcast(const Unit* unit) {
    int32_t bits;
    __builtin_memcpy(&bits, unit, sizeof bits);
    return lanes(_mm512_set1_epi32(bits));
  }
  static Lanes load(const Unit* units) { return lanes(_mm512_loadu_si512(units)); }
  static __m512 units(const Bf16* elements) { return _mm512_loadu_ps(elements); }
  static Lanes lanes_of(__m512 units) { return reinterpret_cast<Lanes>(units); }
  static __m512 multiply_add(__m512 sum, Lanes left, Lanes right) {
    return _mm512_dpbf16_ps(sum, left, right);
  }
  // 32 elements of two rows as units, in an order of columns of its own.
  static void interleave(const Bf16* first, const Bf16* second, Lanes to[2]) {
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    to[0] = tamis::lanes(_mm512_unpacklo_epi16(a, b));
    to[1] = tamis::lanes(_mm512_unpackhi_epi16(a, b));
  }
  // 32 floats from and to that order.
  static void split(__m512 low, __m512 high, __m512 to[2]) {
    const __m512i first =
        _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    to[0] = _mm512_permutex2var_ps(low, first, high);
    to[1] = _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(4)), high);
  }
  static void join(const __m512 from[2], __m512 to[2]) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    to[0] = _mm512_permutex2var_ps(from[0], low, from[1]);
    to[1] = _mm512_permutex2var_ps(from[0], _mm512_add_epi32(low, _mm512_set1_epi32(8)), from[1]);
  }
  // Pack the first of some columns of two rows, whole vectors; returns how many.
  static int64_t pack_rows(const Bf16* const* rows, int64_t columns, Unit* to) {
    const __m512i low = _mm512_set_epi16(  //
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
        39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    int64_t d = 0;
    for (; d + 32 <= columns; d += 32) {
      const __m512i first = _mm512_loadu_si512(rows[0] + d);
      const __m512i second = _mm512_loadu_si512(rows[1] + d);
      _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(first, low, second));
      _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(first, high, second));
    }
    return d;
  }
  static void pack_row(const float* from, int64_t count, Unit* to) {
    for (int64_t i = 0; i < count; i += 32) {
      const Lanes rounded =
          _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
      __builtin_memcpy(to + i / kPack, &rounded, sizeof rounded);
    }
  }
};

template <class T>
struct Products {
  using Dot = FloatDot<Avx512, T>;
  using Outer = FloatOuter<Avx512, T>;
};
template <>
struct Products<Bf16> {
  using Dot = PairDot;
  using Outer = PairOuter;
};

struct Avx512Bf16 : Avx512 {
  template <class T>
  using Dot = typename Products<T>::Dot;
  template <class T>
  using Outer = typename Products<T>::Outer;
};

}  // namespace

// With VNNI, which every processor with AVX512-BF16 has.
template <>
struct Ints<Avx512Bf16> : Avx512Ints<Avx512Bf16> {
  static __m512i dot(__m512i sum, __m512i a, __m512i b) {
    // Not the intrinsic: around it GCC 12 copies every sum from register to register and back.
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};

}  // namespace tamis
