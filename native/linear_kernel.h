// The kernel of linear layers, written once over an instruction set `Isa` (isa_*.h), for rows of
// `T` and weights of `W`: the same, or Int8. Those are widened in registers for a few rows, and
// once per block for more; both add the same products in the same order.
//
// Weights are read once, in blocks of kOutputs rows that all rows of x meet. The first rows that
// meet a block ask for the next one, vector by vector as they read: asked for at once, it would
// find no room among the loads that are under way.
#pragma once

#include "dots.h"
#include "linear.h"

namespace tamis {

template <class Isa, class T, class W>
class LinearKernel {
  using Vec = typename Isa::Vec;
  using Dot = typename Isa::template Dot<T>;
  using Query = typename Dot::Query;
  static constexpr bool kQuantized = sizeof(W) < sizeof(T);
  static constexpr int64_t kFewRows = 4;  // that meet a block at once

  const LinearArgs& args_;
  const int64_t pad_;
  float* const products_;  // [rows, kOutputs]
  Query* const x_;         // [rows, pad_]
  Query* const widened_;   // [kOutputs, pad_] of quantized weights

 public:
  LinearKernel(const LinearArgs& args, float* scratch)
      : args_(args),
        pad_(padded(args.in)),
        products_(scratch),
        x_(reinterpret_cast<Query*>(scratch + args.rows * kOutputs)),
        widened_(reinterpret_cast<Query*>(scratch + args.rows * (kOutputs + pad_))) {}

  void run(int64_t begin, int64_t end) {
    pack_dot_queries<Isa, T>(static_cast<const T*>(args_.x), args_.x_stride, args_.rows, args_.in,
                             x_);
    for (int64_t first = begin; first < end; first += kOutputs) {
      const int64_t count = end - first < kOutputs ? end - first : kOutputs;
      const W* weights[kOutputs];  // after the last one, it is repeated
      for (int64_t j = 0; j < kOutputs; ++j) {
        weights[j] = weight(first + (j < count ? j : count - 1));
      }
      multiply_block(weights, count);
      finish(first, count);
    }
  }

 private:
  // The row of the weight that makes that output.
  const W* weight(int64_t output) const {
    return static_cast<const W*>(args_.weight) + output * args_.in;
  }

  // Products of all rows of x with a block's weights.
  void multiply_block(const W* const* weights, int64_t count) {
    const int64_t block = kOutputs * args_.in;
    const auto prefetch = [block](const W* at) { __builtin_prefetch(at + block, 0, 3); };
    if constexpr (kQuantized) {
      if (args_.rows > kFewRows) return multiply_widened(weights, count, prefetch);
    }
    multiply_all(weights, count, prefetch);
  }

  // The same of quantized weights, widened first.
  template <class Prefetch>
  void multiply_widened(const W* const* weights, int64_t count, Prefetch prefetch) {
    const Query* rows[kOutputs];
    for (int64_t j = 0; j < kOutputs; ++j) {
      Query* const to = widened_ + (j < count ? j : count - 1) * pad_;
      rows[j] = to;
      if (j >= count) continue;
      int64_t d = 0;
      for (; d + Dot::kStep <= args_.in; d += Dot::kStep) {
        prefetch(weights[j] + d);
        const auto lanes = Dot::load(weights[j] + d);
        __builtin_memcpy(to + d, &lanes, sizeof lanes);
      }
      if (const int64_t left = args_.in - d) {
        const auto lanes = Dot::load(weights[j] + d, left);
        __builtin_memcpy(to + d, &lanes, sizeof lanes);
      }
    }
    multiply_all(rows, count, [](const Query*) {});
  }

  // The same, with `beside` as in dot_products for the first rows.
  template <class Weight, class Beside>
  void multiply_all(const Weight* const* weights, int64_t count, Beside beside) {
    int64_t row = 0;
    for (; row + 4 <= args_.rows; row += 4) multiply<4>(row, weights, count, beside);
    for (; row + 2 <= args_.rows; row += 2) multiply<2>(row, weights, count, beside);
    for (; row < args_.rows; ++row) multiply<1>(row, weights, count, beside);
  }

  // Products of N rows of x with a block's weights.
  template <int N, class Weight, class Beside>
  void multiply(int64_t row, const Weight* const* weights, int64_t count, Beside beside) {
    const auto* const x = x_ + row * pad_;
    float* const products = products_ + row * kOutputs;
    if (row > 0) {
      dot_products<Isa, T, N>(x, pad_, weights, count, args_.in, products, kOutputs);
    } else {
      dot_products<Isa, T, N>(x, pad_, weights, count, args_.in, products, kOutputs, beside);
    }
  }

  // Scale a block's products, add the bias and round them.
  void finish(int64_t first, int64_t count) {
    const T* const bias = static_cast<const T*>(args_.bias);
    for (int64_t j = 0; j < count; j += Isa::kWidth) {
      const int64_t n = count - j < Isa::kWidth ? count - j : Isa::kWidth;
      Vec scale = Isa::set(1.0f), added = Isa::set(0.0f);
      if (kQuantized) scale = Isa::load(args_.scales + first + j, n);
      if (bias != nullptr) added = Isa::load(bias + first + j, n);
      for (int64_t row = 0; row < args_.rows; ++row) {
        const Vec product = Isa::load(products_ + row * kOutputs + j);
        T* const y = static_cast<T*>(args_.y) + row * args_.out + first + j;
        Isa::store(y, product * scale + added, n);
      }
    }
  }
};

template <class Isa, class T, class W = T>
void linear_range(const LinearArgs& args, int64_t begin, int64_t end, float* scratch) {
  LinearKernel<Isa, T, W>(args, scratch).run(begin, end);
}

}  // namespace tamis
