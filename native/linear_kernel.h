// The kernel of linear layers, written once over an instruction set `Isa` (isa_*.h).
//
// Weights are read once, in blocks of kOutputs rows that all rows of x meet. The first rows that
// meet a block ask for the next one, vector by vector as they read: asked for at once, it would
// find no room among the loads that are under way.
#pragma once

#include "dots.h"
#include "linear.h"

namespace tamis {

template <class Isa, class T>
class LinearKernel {
  using Query = typename Isa::template Dot<T>::Query;

  const LinearArgs& args_;
  const int64_t pad_;
  float* const products_;  // [rows, kOutputs]
  Query* const x_;         // [rows, pad_]

 public:
  LinearKernel(const LinearArgs& args, float* scratch)
      : args_(args),
        pad_(padded(args.in)),
        products_(scratch),
        x_(reinterpret_cast<Query*>(scratch + args.rows * kOutputs)) {}

  void run(int64_t begin, int64_t end) {
    pack_dot_queries<Isa, T>(static_cast<const T*>(args_.x), args_.x_stride, args_.rows, args_.in,
                             x_);
    for (int64_t first = begin; first < end; first += kOutputs) {
      const int64_t count = end - first < kOutputs ? end - first : kOutputs;
      const T* weights[kOutputs];  // after the last one, it is repeated
      for (int64_t j = 0; j < kOutputs; ++j) {
        weights[j] = weight(first + (j < count ? j : count - 1));
      }
      int64_t row = 0;
      for (; row + 4 <= args_.rows; row += 4) multiply<4>(row, weights, count);
      for (; row + 2 <= args_.rows; row += 2) multiply<2>(row, weights, count);
      for (; row < args_.rows; ++row) multiply<1>(row, weights, count);
      finish(first, count);
    }
  }

 private:
  // The row of the weight that makes that output.
  const T* weight(int64_t output) const {
    return static_cast<const T*>(args_.weight) + output * args_.in;
  }

  // Products of N rows of x with a block's weights.
  template <int N>
  void multiply(int64_t row, const T* const* weights, int64_t count) {
    const auto* const x = x_ + row * pad_;
    float* const products = products_ + row * kOutputs;
    if (row > 0) {
      dot_products<Isa, T, N>(x, pad_, weights, count, args_.in, products, kOutputs);
    } else {
      const int64_t block = kOutputs * args_.in;
      dot_products<Isa, T, N>(x, pad_, weights, count, args_.in, products, kOutputs,
                              [block](const T* at) { __builtin_prefetch(at + block, 0, 3); });
    }
  }

  // Add the bias to a block's products and round them.
  void finish(int64_t first, int64_t count) {
    const T* const bias = static_cast<const T*>(args_.bias);
    for (int64_t row = 0; row < args_.rows; ++row) {
      const float* const products = products_ + row * kOutputs;
      T* const y = static_cast<T*>(args_.y) + row * args_.out + first;
      for (int64_t j = 0; j < count; ++j) {
        from_float(products[j] + (bias != nullptr ? to_float(bias[first + j]) : 0.0f), y + j);
      }
    }
  }
};

template <class Isa, class T>
void linear_range(const LinearArgs& args, int64_t begin, int64_t end, float* scratch) {
  LinearKernel<Isa, T>(args, scratch).run(begin, end);
}

}  // namespace tamis
