// The decode kernel, written once over an instruction set `Isa` (isa_*.h).
//
// One pass over K and V: per block of tokens, scores of all query heads of the group, online
// softmax, then the weighted sum of values. K and V rows come from memory once and serve the whole
// group.
#pragma once

#include "decode.h"
#include "dots.h"
#include "softmax.h"

namespace tamis {

template <class Isa, class T>
class DecodeKernel {
  using Vec = typename Isa::Vec;
  using Dot = typename Isa::template Dot<T>;
  static constexpr int kWidth = Isa::kWidth;
  static constexpr float kNothing = -__builtin_inff();

  // Where the keys and values of a block of tokens lie.
  struct Rows {
    int64_t count;
    const T* k[kBlock + kWidth];  // to a whole number of vectors the last one is repeated
    const T* v[kBlock];
  };

  const Range& range_;
  const Partial& partial_;
  const int64_t k_pad_, v_pad_;
  float* const scores_;                   // [group, kBlock]
  typename Dot::Query* const queries_;    // [group, k_pad_]
  Rows blocks_[2];
  const Rows* rows_ = &blocks_[0];  // of the block at work
  const Rows* next_ = &blocks_[1];  // of the block that is prefetched meanwhile

 public:
  DecodeKernel(const Range& range, float* scratch, const Partial& partial)
      : range_(range),
        partial_(partial),
        k_pad_(padded(range.k_dim)),
        v_pad_(padded(range.v_dim)),
        scores_(scratch),
        queries_(reinterpret_cast<typename Dot::Query*>(scratch + range.group * kBlock)) {}

  void run() {
    pack_dot_queries<Isa, T>(static_cast<const T*>(range_.q), range_.q_stride, range_.group,
                             range_.k_dim, queries_);
    for (int64_t g = 0; g < range_.group; ++g) {
      partial_.top[g] = kNothing;
      partial_.denominator[g] = 0.0f;
    }
    for (int64_t i = 0; i < range_.group * v_pad_; ++i) partial_.sums[i] = 0.0f;
    int64_t ready = 0;  // index of the block at work
    find_rows(range_.begin, &blocks_[0]);
    for (int64_t i = 0; i < blocks_[0].count; ++i) {
      prefetch_row<Isa>(blocks_[0].k[i], range_.k_dim);
      prefetch_row<Isa>(blocks_[0].v[i], range_.v_dim);
    }
    for (int64_t begin = range_.begin; begin < range_.end; begin += kBlock, ready ^= 1) {
      rows_ = &blocks_[ready];
      next_ = &blocks_[ready ^ 1];
      find_rows(begin + kBlock, &blocks_[ready ^ 1]);
      int64_t g = 0;
      for (; g + 4 <= range_.group; g += 4) attend_block<4>(g);
      for (; g + 2 <= range_.group; g += 2) attend_block<2>(g);
      for (; g < range_.group; ++g) attend_block<1>(g);
    }
  }

 private:
  // The rows of at most kBlock tokens from `begin`.
  void find_rows(int64_t begin, Rows* rows) {
    const int64_t left = range_.end - begin, size = range_.pages.page_size;
    const int64_t count = left < 0 ? 0 : left < kBlock ? left : kBlock;
    rows->count = count;
    if (range_.tokens != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t token = range_.tokens[begin + i];
        find_run(token / size, token % size, 1, rows->k + i, rows->v + i);
      }
    } else {
      int64_t entry = begin / size, slot = begin % size;
      for (int64_t i = 0; i < count; ++entry, slot = 0) {
        const int64_t run = size - slot < count - i ? size - slot : count - i;
        find_run(entry, slot, run, rows->k + i, rows->v + i);
        i += run;
      }
    }
    for (int64_t i = count; i % kWidth; ++i) rows->k[i] = rows->k[count - 1];
  }

  // The rows of `run` tokens of one page, the head's page `entry`, from `slot`.
  void find_run(int64_t entry, int64_t slot, int64_t run, const T** k_rows, const T** v_rows) {
    const uint8_t* page = range_.pages.data + range_.pages.table[entry] * kUnit;
    const T* k = reinterpret_cast<const T*>(page + range_.k_offset) + slot * range_.k_dim;
    const T* v = reinterpret_cast<const T*>(page + range_.v_offset) + slot * range_.v_dim;
    for (int64_t i = 0; i < run; ++i) {
      k_rows[i] = k + i * range_.k_dim;
      v_rows[i] = v + i * range_.v_dim;
    }
  }

  // Queries g..g + N over the block's tokens.
  template <int N>
  void attend_block(int64_t g) {
    score<N>(g);
    float rescale[N];
    for (int i = 0; i < N; ++i) rescale[i] = soften_query(g + i);
    int64_t d = 0;
    for (; d + 4 * kWidth <= range_.v_dim; d += 4 * kWidth) add_values<N, 4>(g, d, rescale);
    for (; d + kWidth <= range_.v_dim; d += kWidth) add_values<N, 1>(g, d, rescale);
    if (d < range_.v_dim) add_last_values<N>(g, d, rescale);
  }

  // Products of N queries with the block's keys, prefetching the next block's meanwhile.
  template <int N>
  void score(int64_t g) {
    const auto prefetch_next = [this, g](int64_t t, int64_t tokens) {
      for (int64_t j = t; g == 0 && j < t + tokens && j < next_->count; ++j) {
        prefetch_row<Isa>(next_->k[j], range_.k_dim);
      }
    };
    dot_products<Isa, T, N>(queries_ + g * k_pad_, k_pad_, rows_->k, rows_->count, range_.k_dim,
                            scores_ + g * kBlock, kBlock, prefetch_next);
  }

  // Turn the products of query `g` into weights; returns the factor of its earlier sums.
  float soften_query(int64_t g) {
    return soften<Isa>(scores_ + g * kBlock, rows_->count, range_.scale, range_.softcap,
                       partial_.top + g, partial_.denominator + g);
  }

  // sums = sums rescale + weights V for N queries and D vectors of the values' dimensions.
  template <int N, int D>
  void add_values(int64_t g, int64_t d, const float* rescale) {
    add<N, D>(g, d, rescale, [d](const T* row, int i) {
      return Isa::load(row + d + i * kWidth);
    });
  }

  // The same for dimensions from `d` that are less than a vector.
  template <int N>
  void add_last_values(int64_t g, int64_t d, const float* rescale) {
    const int64_t left = range_.v_dim - d;
    add<N, 1>(g, d, rescale, [d, left](const T* row, int) {
      return Isa::load(row + d, left);
    });
  }

  template <int N, int D, class Load>
  void add(int64_t g, int64_t d, const float* rescale, Load load) {
    float* const sums = partial_.sums + g * v_pad_ + d;
    Vec total[N][D];
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < D; ++i) {
        total[n][i] = Isa::load(sums + n * v_pad_ + i * kWidth) * Isa::set(rescale[n]);
      }
    }
    const float* const weights = scores_ + g * kBlock;
    for (int64_t t = 0; t < rows_->count; ++t) {
      if (g == 0 && d == 0 && t < next_->count) prefetch_row<Isa>(next_->v[t], range_.v_dim);
      Vec values[D];
      for (int i = 0; i < D; ++i) values[i] = load(rows_->v[t], i);
      for (int n = 0; n < N; ++n) {
        const Vec weight = Isa::set(weights[n * kBlock + t]);
        for (int i = 0; i < D; ++i) total[n][i] = Isa::fma(weight, values[i], total[n][i]);
      }
    }
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < D; ++i) Isa::store(sums + n * v_pad_ + i * kWidth, total[n][i]);
    }
  }
};

template <class Isa, class T>
void attend_range(const Range& range, float* scratch, const Partial& partial) {
  DecodeKernel<Isa, T>(range, scratch, partial).run();
}

}  // namespace tamis
