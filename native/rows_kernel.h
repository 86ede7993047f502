// The kernels of rows.h, written once over an instruction set `Isa` (isa_*.h). They round where
// torch's modules do: after every operation on the row's own type.
#pragma once

#include "rows.h"
#include "vector_math.h"

namespace tamis {

template <class Isa, class T>
struct RowMath {
  using Vec = typename Isa::Vec;
  static constexpr int kWidth = Isa::kWidth;

  // Each lane as an element of type T holds it.
  static Vec rounded(Vec v) { return Isa::rounded(v, T{}); }

  // Calls block(i, load, store) for every vector of a row; the last one may be shorter.
  template <class Block>
  static void each(int64_t width, Block block) {
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) {
      block(i, [](const T* from) { return Isa::load(from); },
            [](T* to, Vec v) { Isa::store(to, v); });
    }
    if (const int64_t left = width - i) {
      block(i, [left](const T* from) { return Isa::load(from, left); },
            [left](T* to, Vec v) { Isa::store(to, v, left); });
    }
  }
};

template <class Isa, class T>
void rms_norm_row(const RmsNorm& norm, const void* x_row, int64_t width, void* y_row) {
  using Math = RowMath<Isa, T>;
  using Vec = typename Isa::Vec;
  const T* const x = static_cast<const T*>(x_row);
  const T* const weight = static_cast<const T*>(norm.weight);
  T* const y = static_cast<T*>(y_row);
  Vec squares = Isa::set(0.0f);
  Math::each(width, [&](int64_t i, auto load, auto) {
    const Vec v = load(x + i);
    squares = Isa::fma(v, v, squares);
  });
  const float mean = Isa::sum_lanes(squares) / static_cast<float>(width);
  const Vec factor = Isa::set(1.0f / __builtin_sqrtf(mean + norm.epsilon));
  const Vec one = Isa::set(norm.style == RmsStyle::plus_one ? 1.0f : 0.0f);
  Math::each(width, [&](int64_t i, auto load, auto store) {
    Vec v = load(x + i) * factor;
    if (norm.style == RmsStyle::rounded) v = Math::rounded(v);
    store(y + i, v * (load(weight + i) + one));
  });
}

template <class Isa, class T>
void rotate_row(void* row, const void* cosines, const void* sines, int64_t rotated) {
  using Math = RowMath<Isa, T>;
  using Vec = typename Isa::Vec;
  const int64_t half = rotated / 2;
  T* const x = static_cast<T*>(row);
  const T* const cos = static_cast<const T*>(cosines);
  const T* const sin = static_cast<const T*>(sines);
  Math::each(half, [&](int64_t i, auto load, auto store) {
    const Vec a = load(x + i), b = load(x + half + i);
    const Vec a_cos = Math::rounded(a * load(cos + i));
    const Vec b_cos = Math::rounded(b * load(cos + half + i));
    const Vec b_sin = Math::rounded(b * load(sin + i));
    const Vec a_sin = Math::rounded(a * load(sin + half + i));
    store(x + i, a_cos - b_sin);
    store(x + half + i, b_cos + a_sin);
  });
}

template <class Isa, class T>
void gate_row(void* gates, const void* ups, int64_t width) {
  using Math = RowMath<Isa, T>;
  using Vec = typename Isa::Vec;
  T* const gate = static_cast<T*>(gates);
  const T* const up = static_cast<const T*>(ups);
  const Vec zero = Isa::set(0.0f), one = Isa::set(1.0f);
  Math::each(width, [&](int64_t i, auto load, auto store) {
    const Vec v = load(gate + i);
    const Vec activated = v / (one + VectorMath<Isa>::exp(zero - v));
    store(gate + i, Math::rounded(activated) * load(up + i));
  });
}

template <class Isa, class T>
void add_row(const void* x_row, void* y_row, int64_t width) {
  using Math = RowMath<Isa, T>;
  const T* const x = static_cast<const T*>(x_row);
  T* const y = static_cast<T*>(y_row);
  Math::each(width, [&](int64_t i, auto load, auto store) {
    store(y + i, load(x + i) + load(y + i));
  });
}

}  // namespace tamis
