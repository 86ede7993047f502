// The kernels of observe.h, written once over an instruction set `Isa` (isa_*.h).
#pragma once

#include "dots.h"
#include "observe.h"
#include "packed.h"
#include "vector_math.h"

namespace tamis {

template <class Isa, class T>
struct Observed {
  using Vec = typename Isa::Vec;
  using Math = VectorMath<Isa>;
  static constexpr int64_t kWidth = Isa::kWidth;

  // Call visit(i, key, page, slot) for the tokens begin + i of one head.
  template <class Visit>
  static void each_key(const ObserveArgs& a, int64_t row, int64_t head, int64_t begin, int64_t end,
                       Visit visit) {
    const int32_t* table = a.tables + row * a.tables_row_stride + head * a.tables_head_stride;
    int64_t entry = begin / a.page_size, slot = begin % a.page_size;
    for (int64_t token = begin; token < end; ++entry, slot = 0) {
      const uint8_t* page = a.data + table[entry] * kUnit;
      const T* key = reinterpret_cast<const T*>(page + a.k_offset) + slot * a.k_dim;
      for (; token < end && slot < a.page_size; ++token, ++slot, key += a.k_dim) {
        visit(token - begin, key, page, slot);
      }
    }
  }

  // Products begin..end of query `query` with keys, as weights or scores; they are stored to `to`,
  // or added to it. Readable, but not seen, are products to whole vectors.
  template <bool kAdd>
  static void finish(const ObserveArgs& a, int64_t query, const float* products, int64_t begin,
                     int64_t end, float* to) {
    const Vec lse = Isa::set(a.lse != nullptr ? a.lse[query] : 0.0f);
    for (int64_t j = begin / kWidth * kWidth; j < end; j += kWidth) {
      Vec value = Math::score(Isa::load(products + j), a.scale, a.softcap);
      if (a.lse != nullptr) value = Math::exp(value - lse);
      if (j >= begin && j + kWidth <= end) {
        if (kAdd) value = value + Isa::load(to + j);
        Isa::store(to + j, value);
      } else {
        float lanes[kWidth];
        Isa::store(lanes, value);
        for (int64_t i = j < begin ? begin : j; i < end && i < j + kWidth; ++i) {
          to[i] = kAdd ? to[i] + lanes[i - j] : lanes[i - j];
        }
      }
    }
  }

  // Whether query `query` sees nothing whatever the positions: its weights are zero.
  static bool is_blind(const ObserveArgs& a, int64_t query) {
    return a.lse != nullptr && a.lse[query] == -__builtin_inff();
  }
};

// Keys, packed once, meet the queries tile by tile.
template <class Isa, class T>
class SpanKernel {
  using Keys = Observed<Isa, T>;
  using Matrix = Packed<Isa, T>;
  using Unit = typename Matrix::Unit;

  const ObserveArgs& a_;
  const int64_t head_, begin_, count_, group_, tile_;  // tile_: tokens of a tile of queries
  const int64_t whole_rows_, k_units_;
  float* const scores_;   // [whole_rows_, kKeys]
  float* const sums_;     // [group_, kSpan]
  Unit* const queries_;   // [whole_rows_, k_units_]
  Unit* const keys_;      // [k_units_, kSpan]
  int64_t position_[kSpan];
  int64_t low_[kQueryRows], high_[kQueryRows];  // token i of the tile sees keys low_[i]..high_[i]
  typename Matrix::Product product_;

 public:
  SpanKernel(const ObserveArgs& args, int64_t head, int64_t begin, int64_t end, float* scratch)
      : a_(args),
        head_(head),
        begin_(begin),
        count_(end - begin),
        group_(args.q_heads / args.kv_heads),
        tile_(query_tile(group_)),
        whole_rows_(Matrix::whole_rows(tile_ * group_)),
        k_units_(Matrix::units(args.k_dim)),
        scores_(scratch),
        sums_(scores_ + whole_rows_ * kKeys),
        queries_(reinterpret_cast<Unit*>(sums_ + group_ * kSpan)),
        keys_(queries_ + whole_rows_ * k_units_) {}

  void run() {
    pack_keys();
    for (int64_t i = 0; i < group_ * kSpan; ++i) sums_[i] = 0.0f;
    for (int64_t i = 0; i < whole_rows_ * k_units_; ++i) queries_[i] = Unit{};
    int64_t token = 0, low = 0, high = 0;
    while (token < a_.n && a_.positions[token] < position_[0]) ++token;
    for (; token < a_.n && low < count_; token += tile_) {
      const int64_t tokens = a_.n - token < tile_ ? a_.n - token : tile_;
      for (int64_t i = 0; i < tokens; ++i) {
        const int64_t at = a_.positions[token + i];
        while (high < count_ && position_[high] <= at) ++high;
        while (a_.window > 0 && low < count_ && position_[low] <= at - a_.window) ++low;
        low_[i] = low;
        high_[i] = high;
      }
      if (low_[0] < high) meet(token, tokens);
    }
    if (a_.lse == nullptr) return;
    for (int64_t g = 0; g < group_; ++g) {
      float* const out = a_.out + (head_ * group_ + g) * a_.width + begin_;
      for (int64_t j = 0; j < count_; ++j) out[j] = sums_[g * kSpan + j];
    }
  }

 private:
  void pack_keys() {
    const T* keys[kSpan];
    Keys::each_key(a_, 0, head_, begin_, begin_ + count_,
                   [&](int64_t i, const T* key, const uint8_t* page, int64_t slot) {
                     int32_t position;
                     __builtin_memcpy(&position,
                                      page + a_.position_offset + slot * int64_t{sizeof position},
                                      sizeof position);
                     position_[i] = position;
                     keys[i] = key;
                   });
    Matrix::pack_columns(keys, count_, a_.k_dim, keys_, kSpan);
  }

  // The queries of `tokens` tokens from `token` and the keys that any of them sees.
  void meet(int64_t token, int64_t tokens) {
    const T* const q = reinterpret_cast<const T*>(a_.q.data);
    for (int64_t r = 0; r < tokens * group_; ++r) {
      Matrix::pack_row(q + (token + r / group_) * a_.q.token_stride +
                           (head_ * group_ + r % group_) * a_.q.head_stride,
                       a_.k_dim, queries_ + r * k_units_);
    }
    for (int64_t at = low_[0] / kKeys * kKeys; at < high_[tokens - 1]; at += kKeys) {
      const int64_t keys = count_ - at < kKeys ? count_ - at : kKeys;
      product_.multiply(Matrix::whole_rows(tokens * group_), queries_, k_units_, keys_ + at, kSpan,
                        k_units_, Matrix::round_up(keys, Isa::kWidth), false, scores_, kKeys);
      for (int64_t i = 0; i < tokens; ++i) {
        const int64_t low = low_[i] > at ? low_[i] - at : 0;
        const int64_t high = high_[i] - at < keys ? high_[i] - at : keys;
        for (int64_t g = 0; low < high && g < group_; ++g) {
          finish(token + i, g, scores_ + (i * group_ + g) * kKeys, at, low, high);
        }
      }
    }
  }

  // Keys at + low..at + high of the span for query head `g` of the group.
  void finish(int64_t token, int64_t g, const float* products, int64_t at, int64_t low,
              int64_t high) {
    const int64_t q_head = head_ * group_ + g, query = token * a_.q_heads + q_head;
    if (Keys::is_blind(a_, query)) return;
    if (a_.lse != nullptr) {
      Keys::template finish<true>(a_, query, products, low, high, sums_ + g * kSpan + at);
    } else {
      float* const out = a_.out + (q_head * a_.n + token) * a_.width + begin_ + at;
      Keys::template finish<false>(a_, query, products, low, high, out);
    }
  }
};

template <class Isa, class T>
void observe_span(const ObserveArgs& args, int64_t head, int64_t begin, int64_t end,
                  float* scratch) {
  SpanKernel<Isa, T>(args, head, begin, end, scratch).run();
}

// One pass over the keys of one row's head, for all query heads of the group.
template <class Isa, class T>
class RangeKernel {
  using Keys = Observed<Isa, T>;
  using Query = typename Isa::template Dot<T>::Query;

  const ObserveArgs& a_;
  const int64_t row_, begin_, count_, group_, first_query_;
  float* const products_;  // [group_, kBlock]
  Query* const queries_;   // [group_, padded k_dim]
  const T* keys_[kObserved + Isa::kWidth];  // to whole vectors the last one is repeated
  RowsAhead<T> ahead_;                      // of the next block

 public:
  RangeKernel(const ObserveArgs& args, int64_t row, int64_t head, int64_t begin, int64_t end,
              float* scratch)
      : a_(args),
        row_(row),
        begin_(begin),
        count_(end - begin),
        group_(args.q_heads / args.kv_heads),
        first_query_(row * args.q_heads + head * group_),
        products_(scratch),
        queries_(reinterpret_cast<Query*>(scratch + group_ * kBlock)) {
    const T* const q = reinterpret_cast<const T*>(a_.q.data) + row * a_.q.token_stride +
                       head * group_ * a_.q.head_stride;
    pack_dot_queries<Isa, T>(q, a_.q.head_stride, group_, a_.k_dim, queries_);
    Keys::each_key(a_, row, head, begin, end,
                   [this](int64_t i, const T* key, const uint8_t*, int64_t) { keys_[i] = key; });
    for (int64_t i = count_; i % Isa::kWidth; ++i) keys_[i] = keys_[count_ - 1];
  }

  void run() {
    for (int64_t t = 0; t < count_ && t < kBlock; ++t) prefetch_row(keys_[t], a_.k_dim);
    for (int64_t at = 0; at < count_; at += kBlock) {
      const int64_t next = at + kBlock, left = count_ - next;
      ahead_ = {keys_ + next, left < kBlock ? left : kBlock, a_.k_dim};
      int64_t g = 0;
      for (; g + 4 <= group_; g += 4) meet<4>(g, at);
      for (; g + 2 <= group_; g += 2) meet<2>(g, at);
      for (; g < group_; ++g) meet<1>(g, at);
    }
  }

 private:
  // N queries of the group from `g` and a block of keys, prefetching the next block's meanwhile.
  template <int N>
  void meet(int64_t g, int64_t at) {
    const int64_t keys = count_ - at < kBlock ? count_ - at : kBlock;
    float* const products = products_ + g * kBlock;
    dot_products<Isa, T, N>(queries_ + g * padded(a_.k_dim), padded(a_.k_dim), keys_ + at, keys,
                            a_.k_dim, products, kBlock, [&](const T*) { ahead_.ask(); });
    for (int64_t i = 0; i < N; ++i) {
      const int64_t query = first_query_ + g + i;
      if (Keys::is_blind(a_, query)) continue;
      Keys::template finish<false>(a_, query, products + i * kBlock, 0, keys,
                                   a_.out + query * a_.width + begin_ + at);
    }
  }
};

template <class Isa, class T>
void observe_range(const ObserveArgs& args, int64_t row, int64_t head, int64_t begin, int64_t end,
                   float* scratch) {
  RangeKernel<Isa, T>(args, row, head, begin, end, scratch).run();
}

}  // namespace tamis
