// The kernel of observe_pages.h, written once over an instruction set `Isa` (isa_*.h).
//
// The largest product of q with a key between `low` and `high` is max(q, 0) high + min(q, 0) low,
// channel by channel: two inner products per page.
#pragma once

#include "dots.h"
#include "observe_pages.h"

namespace tamis {

template <class Isa, class T>
class BoundKernel {
  using Query = typename Isa::template Dot<T>::Query;

  const BoundedRange& range_;
  const int64_t pad_;
  float* const low_products_;   // [group, kBlock]
  float* const high_products_;  // [group, kBlock]
  Query* const negative_;       // [group, pad_]: min(q, 0)
  Query* const positive_;       // [group, pad_]: max(q, 0)
  const T* low_[kBlock + Isa::kWidth];  // to whole vectors the last one is repeated
  const T* high_[kBlock + Isa::kWidth];

 public:
  BoundKernel(const BoundedRange& range, float* scratch)
      : range_(range),
        pad_(padded(range.k_dim)),
        low_products_(scratch),
        high_products_(scratch + range.group * kBlock),
        negative_(reinterpret_cast<Query*>(high_products_ + range.group * kBlock)),
        positive_(negative_ + range.group * pad_) {}

  void run() {
    pack_queries();
    for (int64_t at = 0; at < range_.count; at += kBlock) {
      const int64_t count = range_.count - at < kBlock ? range_.count - at : kBlock;
      find_rows(at, count);
      int64_t g = 0;
      for (; g + 4 <= range_.group; g += 4) multiply<4>(g, count);
      for (; g + 2 <= range_.group; g += 2) multiply<2>(g, count);
      for (; g < range_.group; ++g) multiply<1>(g, count);
      for (int64_t i = 0; i < count; ++i) {
        float most = low_products_[i] + high_products_[i];
        for (g = 1; g < range_.group; ++g) {
          const float bound = low_products_[g * kBlock + i] + high_products_[g * kBlock + i];
          if (bound > most) most = bound;
        }
        range_.out[at + i] = most;
      }
    }
  }

 private:
  void pack_queries() {
    const T* const q = static_cast<const T*>(range_.q);
    for (int64_t g = 0; g < range_.group; ++g) {
      for (int64_t d = 0; d < pad_; ++d) {
        const T x = d < range_.k_dim ? q[g * range_.q_stride + d] : T{};
        negative_[g * pad_ + d] = to_float(x) < 0.0f ? query(x) : Query{};
        positive_[g * pad_ + d] = to_float(x) < 0.0f ? Query{} : query(x);
      }
    }
  }

  static Query query(T x) { return Isa::template Dot<T>::query(x); }

  // The rows of `count` pages; they lie a page apart, so all are asked for before one is read.
  void find_rows(int64_t at, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* const page = range_.data + range_.table[at + i] * kUnit;
      low_[i] = reinterpret_cast<const T*>(page + range_.low_offset);
      high_[i] = reinterpret_cast<const T*>(page + range_.high_offset);
      prefetch_row(low_[i], range_.k_dim);
      prefetch_row(high_[i], range_.k_dim);
    }
    for (int64_t i = count; i % Isa::kWidth; ++i) {
      low_[i] = low_[count - 1];
      high_[i] = high_[count - 1];
    }
  }

  template <int N>
  void multiply(int64_t g, int64_t count) {
    dot_products<Isa, T, N>(negative_ + g * pad_, pad_, low_, count, range_.k_dim,
                            low_products_ + g * kBlock, kBlock);
    dot_products<Isa, T, N>(positive_ + g * pad_, pad_, high_, count, range_.k_dim,
                            high_products_ + g * kBlock, kBlock);
  }
};

template <class Isa, class T>
void bound_pages(const BoundedRange& range, float* scratch) {
  BoundKernel<Isa, T>(range, scratch).run();
}

}  // namespace tamis
