// Functions on vectors of an instruction set `Isa` (isa_*.h), and the products that have no special
// instruction. Everything here and in the kernels is a template on `Isa`, and nothing of the
// standard library is used, so that translation units of different instruction sets share no
// function.
#pragma once

#include "element.h"

namespace tamis {

template <class Isa>
struct VectorMath {
  using Vec = typename Isa::Vec;

  // exp(x), exactly 0 below -87.3 and NaN for NaN: 2^n times the Taylor polynomial of 2^f, where
  // n + f = x log2(e), n is whole and |f| <= 1/2.
  static Vec exp(Vec x) {
    constexpr float kLog2E = 1.44269504f;
    constexpr float kTaylor[] = {1.52527338e-5f, 1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f,
                                 5.55041087e-2f, 0.240226507f,   0.693147181f,   1.0f};
    const Vec y = Isa::max(Isa::set(-126.0f), Isa::min(Isa::set(126.0f), x * Isa::set(kLog2E)));
    const Vec n = Isa::round(y);
    const Vec f = y - n;
    Vec p = Isa::set(kTaylor[0]);
    for (int i = 1; i < 8; ++i) p = Isa::fma(p, f, Isa::set(kTaylor[i]));
    return Isa::zero_below(Isa::scale(p, n), x, -87.3f);
  }

  static Vec tanh(Vec x) {
    const Vec one = Isa::set(1.0f);
    return one - (one + one) / (exp(x + x) + one);
  }

  // The attention score of a product of query and key; softcap 0 is none.
  static Vec score(Vec product, float scale, float softcap) {
    const Vec score = product * Isa::set(scale);
    if (softcap <= 0.0f) return score;
    const Vec cap = Isa::set(softcap);
    return cap * tanh(score / cap);
  }
};

// Inner products of keys with queries that are kept in fp32, for any element type `T`: lanes run
// along the dimension.
template <class Isa, class T>
struct FloatDot {
  using Query = float;
  using Lanes = typename Isa::Vec;
  static constexpr int64_t kStep = Isa::kWidth;

  static Query query(T value) { return to_float(value); }
  static Lanes load(const float* query) { return Isa::load(query); }
  template <class Key>
  static Lanes load(const Key* key) {
    return Isa::load(key);
  }
  template <class Key>
  static Lanes load(const Key* key, int64_t count) {
    return Isa::load(key, count);
  }
  static typename Isa::Vec multiply_add(typename Isa::Vec sum, Lanes query, Lanes key) {
    return Isa::fma(query, key, sum);
  }
};

// Products of matrices whose elements are packed into units of 4 bytes: here one fp32 each. One
// unit of the left matrix meets a vector of units of the right one, whose lanes run along columns.
template <class Isa, class T>
struct FloatOuter {
  using Unit = float;
  using Lanes = typename Isa::Vec;
  static constexpr int kPack = 1;  // elements along the depth per unit

  static Unit pack(const T* elements) { return to_float(elements[0]); }
  static Lanes broadcast(const Unit* unit) { return Isa::set(*unit); }
  static Lanes load(const Unit* units) { return Isa::load(units); }
  // A vector of a row's units, and what multiply_add takes of it.
  static typename Isa::Vec units(const T* elements) { return Isa::load(elements); }
  static Lanes lanes_of(typename Isa::Vec units) { return units; }
  static typename Isa::Vec multiply_add(typename Isa::Vec sum, Lanes left, Lanes right) {
    return Isa::fma(left, right, sum);
  }
  // Pack the first of some columns of one row, whole vectors; returns how many.
  static int64_t pack_rows(const T* const* rows, int64_t columns, Unit* to) {
    int64_t d = 0;
    for (; d + Isa::kWidth <= columns; d += Isa::kWidth) Isa::store(to + d, Isa::load(*rows + d));
    return d;
  }
  // Pack `count` floats, a multiple of 32, of one row.
  static void pack_row(const float* from, int64_t count, Unit* to) {
    for (int64_t i = 0; i < count; i += Isa::kWidth) Isa::store(to + i, Isa::load(from + i));
  }
};

}  // namespace tamis
