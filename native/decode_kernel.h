// The decode kernel, written once over an instruction set `Isa` (isa_*.h).
//
// One pass over K and V: per block of tokens, scores of all query heads of the group, online
// softmax, then the weighted sum of values. K and V rows come from memory once and serve up to 8
// query heads of a group together. Where vectors are wide, the elements of three or more products
// are not added up across the lanes of a vector, which costs more than the products of a short key:
// the keys are transposed once for all queries, so that lanes are tokens.
#pragma once

#include "decode.h"
#include "dots.h"
#include "softmax.h"

namespace tamis {

template <class Isa, class T>
class DecodeKernel {
  using Vec = typename Isa::Vec;
  using Dot = typename Isa::template Dot<T>;
  using Outer = typename Isa::template Outer<T>;
  using Unit = typename Outer::Unit;
  static constexpr int kWidth = Isa::kWidth;
  static constexpr bool kWide = kWidth == 16;
  static constexpr int kMostQueries = kWide ? 8 : 4;  // of one pass: what registers hold
  static constexpr float kNothing = -__builtin_inff();

  // Where the keys and values of a block of tokens lie.
  struct Rows {
    int64_t count;
    const T* k[kBlock + kWidth];  // to a whole number of vectors the last one is repeated
    const T* v[kBlock + 1];       // to an even number likewise
  };

  const Range& range_;
  const Partial& partial_;
  const int64_t k_pad_, v_pad_;
  const bool transposes_;  // the keys, so that lanes are tokens
  float* const scores_;                   // [group, kBlock]
  typename Dot::Query* const queries_;    // [group, k_pad_]
  Unit weights_[kMostQueries][kBlock];  // of the block, packed
  Rows blocks_[2];
  const Rows* rows_ = &blocks_[0];  // of the block at work
  RowsAhead<T> keys_ahead_, values_ahead_;  // of the next block

 public:
  DecodeKernel(const Range& range, float* scratch, const Partial& partial)
      : range_(range),
        partial_(partial),
        k_pad_(padded(range.k_dim)),
        v_pad_(padded(range.v_dim)),
        transposes_(Isa::kTransposes && range.k_dim % (kWidth * Outer::kPack) == 0),
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
    find_rows(range_.begin, range_.end, &blocks_[0]);
    for (int64_t i = 0; !range_.warm && i < blocks_[0].count; ++i) {
      prefetch_row(blocks_[0].k[i], range_.k_dim);
      prefetch_row(blocks_[0].v[i], range_.v_dim);
    }
    for (int64_t begin = range_.begin; begin < range_.end; begin += kBlock, ready ^= 1) {
      rows_ = &blocks_[ready];
      const Rows& next = blocks_[ready ^ 1];
      const int64_t end = begin + kBlock;
      if (end < range_.end) {
        find_rows(end, range_.end, &blocks_[ready ^ 1]);
      } else {
        find_rows(range_.end, range_.ahead, &blocks_[ready ^ 1]);  // to prefetch it only
      }
      keys_ahead_ = {next.k, next.count, range_.k_dim};
      values_ahead_ = {next.v, next.count, range_.v_dim};
      for (int64_t g = 0; g < range_.group; g += kMostQueries) {
        attend_queries<kMostQueries>(g, range_.group - g);
      }
    }
  }

 private:
  // The rows of at most kBlock tokens from `begin`.
  void find_rows(int64_t begin, int64_t end, Rows* rows) {
    const int64_t left = end - begin, size = range_.pages.page_size;
    const int64_t count = left < kBlock ? left : kBlock;
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
    if (count % 2) rows->v[count] = rows->v[count - 1];
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

  // The next `left` queries from `g`, at most N, over the block's tokens. Where products are added
  // across lanes, their number must divide a vector's width.
  template <int N>
  void attend_queries(int64_t g, int64_t left) {
    if (left >= N) {
      attend_block<N>(g);
    } else if constexpr (N > 1) {
      if (transposes_) {
        attend_queries<N - 1>(g, left);
      } else {
        attend_queries<N / 2>(g, left);
        if (left > N / 2) attend_queries<N / 2>(g + N / 2, left - N / 2);
      }
    }
  }

  // Queries g..g + N over the block's tokens.
  template <int N>
  void attend_block(int64_t g) {
    score<N>(g);
    float rescale[N];
    for (int i = 0; i < N; ++i) rescale[i] = soften_query(g + i);
    if constexpr (Outer::kPack == 2) {
      if (range_.v_dim % (2 * kWidth) == 0) return add_value_pairs<N>(g, rescale);
    }
    int64_t d = 0;
    if constexpr (N > 4) {
      for (; d + 2 * kWidth <= range_.v_dim; d += 2 * kWidth) add_values<N, 2>(g, d, rescale);
    } else {
      for (; d + 4 * kWidth <= range_.v_dim; d += 4 * kWidth) add_values<N, 4>(g, d, rescale);
    }
    for (; d + kWidth <= range_.v_dim; d += kWidth) add_values<N, 1>(g, d, rescale);
    if (d < range_.v_dim) add_last_values<N>(g, d, rescale);
  }

  // Products of N queries with the block's keys, prefetching the next block's meanwhile.
  template <int N>
  void score(int64_t g) {
    if constexpr (N > 2 && Isa::kTransposes) {
      if (transposes_) return multiply_transposed<N>(g);
    }
    if constexpr (kWidth % N == 0) {
      RowsAhead<T> ahead = keys_ahead_;  // in registers
      dot_products<Isa, T, N>(queries_ + g * k_pad_, k_pad_, rows_->k, rows_->count, range_.k_dim,
                              scores_ + g * kBlock, kBlock, [&](const T*) { ahead.ask(); });
      keys_ahead_ = ahead;
    }
  }

  // The same with tokens in the lanes.
  template <int N>
  void multiply_transposed(int64_t g) {
    const Unit* const queries = reinterpret_cast<const Unit*>(queries_ + g * k_pad_);
    const int64_t stride = k_pad_ / Outer::kPack, units = range_.k_dim / Outer::kPack;
    RowsAhead<T> ahead = keys_ahead_;  // in registers
    for (int64_t t = 0; t < rows_->count; t += kWidth) {
      Vec products[N];
      for (int n = 0; n < N; ++n) products[n] = Isa::set(0.0f);
      for (int64_t u = 0; u < units; u += kWidth) {
        Vec keys[kWidth];
        for (int j = 0; j < kWidth; ++j) keys[j] = Outer::units(rows_->k[t + j] + u * Outer::kPack);
        Isa::transpose(keys);
        for (int i = 0; i < kWidth; ++i) {
          ahead.ask();
          for (int n = 0; n < N; ++n) {
            const auto query = Outer::broadcast(queries + n * stride + u + i);
            products[n] = Outer::multiply_add(products[n], query, Outer::lanes_of(keys[i]));
          }
        }
      }
      for (int n = 0; n < N; ++n) Isa::store(scores_ + (g + n) * kBlock + t, products[n]);
    }
    keys_ahead_ = ahead;
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

  // The same for two tokens at a time, whose weights and values are pairs of units. The weights
  // are rounded to the values' type.
  template <int N>
  void add_value_pairs(int64_t g, const float* rescale) {
    for (int n = 0; n < N; ++n) {
      float* const weights = scores_ + (g + n) * kBlock;
      for (int64_t t = rows_->count; t % 32; ++t) weights[t] = 0.0f;
      Outer::pack_row(weights, (rows_->count + 31) / 32 * 32, weights_[n]);
    }
    int64_t d = 0;
    if constexpr (N <= 4) {
      for (; d + 4 * kWidth <= range_.v_dim; d += 4 * kWidth) add_pairs<N, 2>(g, d, rescale);
    }
    for (; d < range_.v_dim; d += 2 * kWidth) add_pairs<N, 1>(g, d, rescale);
  }

  // For N queries and D times two vectors of the values' dimensions.
  template <int N, int D>
  void add_pairs(int64_t g, int64_t d, const float* rescale) {
    float* const sums = partial_.sums + g * v_pad_ + d;
    Vec total[N][D][2];
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < D; ++i) {
        const float* const from = sums + n * v_pad_ + i * 2 * kWidth;
        Outer::split(Isa::load(from) * Isa::set(rescale[n]),
                     Isa::load(from + kWidth) * Isa::set(rescale[n]), total[n][i]);
      }
    }
    RowsAhead<T> ahead = values_ahead_;  // in registers
    for (int64_t t = 0; t < rows_->count; t += 2) {
      typename Outer::Lanes values[D][2];
      for (int i = 0; i < D; ++i) {
        const int64_t at = d + i * 2 * kWidth;
        for (int line = 0; line < 2; ++line) ahead.ask();
        Outer::interleave(rows_->v[t] + at, rows_->v[t + 1] + at, values[i]);
      }
      for (int n = 0; n < N; ++n) {
        const auto weight = Outer::broadcast(weights_[n] + t / 2);
        for (int i = 0; i < D; ++i) {
          for (int h = 0; h < 2; ++h) {
            total[n][i][h] = Outer::multiply_add(total[n][i][h], weight, values[i][h]);
          }
        }
      }
    }
    values_ahead_ = ahead;
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < D; ++i) {
        Vec joined[2];
        Outer::join(total[n][i], joined);
        float* const to = sums + n * v_pad_ + i * 2 * kWidth;
        Isa::store(to, joined[0]);
        Isa::store(to + kWidth, joined[1]);
      }
    }
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
    RowsAhead<T> ahead = values_ahead_;  // in registers
    for (int64_t t = 0; t < rows_->count; ++t) {
      Vec values[D];
      for (int i = 0; i < D; ++i) {
        ahead.ask();
        values[i] = load(rows_->v[t], i);
      }
      for (int n = 0; n < N; ++n) {
        const Vec weight = Isa::set(weights[n * kBlock + t]);
        for (int i = 0; i < D; ++i) total[n][i] = Isa::fma(weight, values[i], total[n][i]);
      }
    }
    values_ahead_ = ahead;
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
