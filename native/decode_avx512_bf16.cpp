#include "isa_avx512.h"

namespace tamis {
namespace {

// The dot product of bf16 keys with bf16 queries: 32 exact products, added in pairs in fp32.
struct PairDot {
  using Query = Bf16;
  using Lanes = __m512bh;
  static constexpr int64_t kStep = 32;

  static Query query(Bf16 value) { return value; }
  static Lanes load(const Bf16* from) { return lanes(_mm512_loadu_si512(from)); }
  static Lanes load(const Bf16* from, int64_t count) {
    return lanes(_mm512_maskz_loadu_epi16((1u << count) - 1, from));
  }
  static __m512 multiply_add(__m512 sum, Lanes query, Lanes key) {
    return _mm512_dpbf16_ps(sum, query, key);
  }

 private:
  static Lanes lanes(__m512i bits) { return reinterpret_cast<Lanes>(bits); }
};

template <class T>
struct DotOf {
  using Type = FloatDot<Avx512, T>;
};
template <>
struct DotOf<Bf16> {
  using Type = PairDot;
};

struct Avx512Bf16 : Avx512 {
  template <class T>
  using Dot = typename DotOf<T>::Type;
};

}  // namespace

AttendRange* attend_range_avx512_bf16(DType dtype) { return attend_range_for<Avx512Bf16>(dtype); }

}  // namespace tamis
