// The kernel of rotate.h, written once over an instruction set `Isa` (isa_*.h): fp32 inside,
// rounded once.
#pragma once

#include "rotate.h"
#include "rows_kernel.h"

namespace tamis {

template <class Isa, class T>
void rotate_key(const RotateArgs& args, int64_t row) {
  using Vec = typename Isa::Vec;
  const T* const k = static_cast<const T*>(args.k) + row * args.dim;
  T* const out = static_cast<T*>(args.out) + row * args.dim;
  const int64_t pairs = args.pairs, angle = args.angle[row % args.tokens];
  const float* const cos = args.cos + angle * pairs;
  const float* const sin = args.sin + angle * pairs;
  if (args.interleaved) {
    for (int64_t i = 0; i < pairs; ++i) {
      const float a = to_float(k[2 * i]), b = to_float(k[2 * i + 1]);
      from_float(a * cos[i] - b * sin[i], out + 2 * i);
      from_float(b * cos[i] + a * sin[i], out + 2 * i + 1);
    }
  } else {
    RowMath<Isa, T>::each(pairs, [&](int64_t i, auto load, auto store) {
      const bool whole = pairs - i >= Isa::kWidth;
      const auto angles = [&](const float* from) {
        return whole ? Isa::load(from + i) : Isa::load(from + i, pairs - i);
      };
      const Vec a = load(k + i), b = load(k + pairs + i);
      const Vec c = angles(cos), s = angles(sin);
      store(out + i, a * c - b * s);
      store(out + pairs + i, b * c + a * s);
    });
  }
  for (int64_t i = 2 * pairs; i < args.dim; ++i) out[i] = k[i];
}

}  // namespace tamis
