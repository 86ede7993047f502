// The prefill kernel, written once over an instruction set `Isa` (isa_*.h).
//
// A tile of queries (the rows: tokens times the query heads that share a KV head) meets the keys
// tile by tile, with online softmax: scores = Q K^T, weights = exp(scores - top), sums += weights V.
// Keys and values are packed for the matrix products once per tile, straight from the pages.
#pragma once

#include "packed.h"
#include "prefill.h"
#include "vector_math.h"

namespace tamis {

template <class Isa, class T>
class PrefillKernel {
  using Vec = typename Isa::Vec;
  using Math = VectorMath<Isa>;
  using Matrix = Packed<Isa, T>;
  using Outer = typename Isa::template Outer<T>;
  using Unit = typename Outer::Unit;
  static constexpr int64_t kWidth = Isa::kWidth;
  static constexpr int64_t kPack = Outer::kPack;
  static constexpr float kNothing = -__builtin_inff();

  // The keys and values at work.
  struct Tile {
    int64_t count;
    const T* k[kKeys];
    const T* v[kKeys];
    int64_t position[kKeys];  // only with a window
  };

  const PrefillArgs& a_;
  const int64_t head_, first_, last_, group_, rows_, whole_rows_;
  const int64_t k_units_, v_pad_;  // depth of Q K^T in units; columns of the sums
  float* const sums_;              // [whole_rows_, v_pad_]
  float* const scores_;            // [whole_rows_, kKeys]
  float* const top_;               // [whole_rows_]
  float* const denominator_;       // [whole_rows_]
  Unit* const queries_;            // [whole_rows_, k_units_]
  Unit* const weights_;            // [whole_rows_, kKeys / kPack]
  Unit* const keys_;               // [k_units_, kKeys]
  Unit* const values_;             // [kKeys / kPack, v_pad_]
  Tile tile_;

 public:
  PrefillKernel(const PrefillArgs& args, int64_t head, int64_t first, int64_t last, float* scratch)
      : a_(args),
        head_(head),
        first_(first),
        last_(last),
        group_(args.q_heads / args.kv_heads),
        rows_((last - first) * group_),
        whole_rows_((rows_ + kRows - 1) / kRows * kRows),
        k_units_((args.k_dim + kPack - 1) / kPack),
        v_pad_(padded(args.v_dim)),
        sums_(scratch),
        scores_(sums_ + whole_rows_ * v_pad_),
        top_(scores_ + whole_rows_ * kKeys),
        denominator_(top_ + whole_rows_),
        queries_(reinterpret_cast<Unit*>(denominator_ + whole_rows_)),
        weights_(queries_ + whole_rows_ * k_units_),
        keys_(weights_ + whole_rows_ * (kKeys / kPack)),
        values_(keys_ + k_units_ * kKeys) {}

  void run() {
    pack_queries();
    for (int64_t r = 0; r < whole_rows_; ++r) {
      top_[r] = kNothing;
      denominator_[r] = 0.0f;
    }
    for (int64_t i = 0; i < whole_rows_ * v_pad_; ++i) sums_[i] = 0.0f;
    if (a_.lengths != nullptr) {
      const int64_t length = a_.lengths[head_ * a_.lengths_head_stride];
      for (int64_t begin = 0; begin < length; begin += kKeys) {
        const int64_t end = begin + kKeys < length ? begin + kKeys : length;
        if (is_visible(cached_position(end - 1))) attend_cached(begin, end);
      }
    }
    for (int64_t begin = 0; begin < last_; begin += kKeys) {
      const int64_t end = begin + kKeys < last_ ? begin + kKeys : last_;
      if (is_visible(a_.positions[end - 1])) attend_own(begin, end);
    }
    for (int64_t r = 0; r < rows_; ++r) finish(r);
  }

 private:
  int64_t token_of(int64_t row) const { return first_ + row / group_; }
  int64_t query_head_of(int64_t row) const { return head_ * group_ + row % group_; }

  // Whether any query of this tile may see keys up to `position`, the last of theirs.
  bool is_visible(int64_t position) const {
    return a_.window == 0 || position > a_.positions[first_] - a_.window;
  }

  const uint8_t* cached_row(int64_t token, int64_t offset, int64_t row_bytes) const {
    const int32_t* table = a_.tables + head_ * a_.tables_head_stride;
    return a_.data + table[token / a_.page_size] * kUnit + offset +
           token % a_.page_size * row_bytes;
  }

  int64_t cached_position(int64_t token) const {
    int32_t position;
    __builtin_memcpy(&position, cached_row(token, a_.position_offset, sizeof position),
                     sizeof position);
    return position;
  }

  void attend_cached(int64_t begin, int64_t end) {
    tile_.count = end - begin;
    for (int64_t j = 0; j < tile_.count; ++j) {
      const auto row = [&](int64_t offset, int64_t dim) {
        return reinterpret_cast<const T*>(cached_row(begin + j, offset, dim * int64_t{sizeof(T)}));
      };
      tile_.k[j] = row(a_.k_offset, a_.k_dim);
      tile_.v[j] = row(a_.v_offset, a_.v_dim);
      if (a_.window > 0) tile_.position[j] = cached_position(begin + j);
    }
    attend([this](int64_t) { return tile_.count; });
  }

  void attend_own(int64_t begin, int64_t end) {
    tile_.count = end - begin;
    for (int64_t j = 0; j < tile_.count; ++j) {
      const auto row = [&](const Heads& from) {
        return reinterpret_cast<const T*>(from.data) + (begin + j) * from.token_stride +
               head_ * from.head_stride;
      };
      tile_.k[j] = row(a_.k);
      tile_.v[j] = row(a_.v);
      tile_.position[j] = a_.positions[begin + j];
    }
    attend([this, begin](int64_t r) {
      const int64_t causal = token_of(r) + 1 - begin;
      return causal < 0 ? 0 : causal < tile_.count ? causal : tile_.count;
    });
  }

  // One tile of keys; row `r` sees at most the first `limit(r)` of them.
  template <class Limit>
  void attend(Limit limit) {
    Matrix::pack_columns(tile_.k, tile_.count, a_.k_dim, keys_, kKeys);
    pack_values();
    Matrix::multiply(whole_rows_, queries_, k_units_, keys_, kKeys, k_units_,
                     Matrix::round_up(tile_.count, kWidth), false, scores_, kKeys);
    for (int64_t r = 0; r < rows_; ++r) {
      int64_t begin = 0;
      const int64_t end = limit(r);
      if (a_.window > 0) {
        const int64_t before = a_.positions[token_of(r)] - a_.window;
        while (begin < end && tile_.position[begin] <= before) ++begin;
      }
      soften(r, begin, end);
    }
    Matrix::multiply(whole_rows_, weights_, kKeys / kPack, values_, v_pad_,
                     Matrix::round_up(tile_.count, kPack) / kPack, v_pad_, true, sums_, v_pad_);
  }

  // Turn the scores of row `r` into weights exp(score - top), zero outside of begin..end, and
  // rescale what was summed before to the new top.
  void soften(int64_t r, int64_t begin, int64_t end) {
    float* const scores = scores_ + r * kKeys;
    Unit* const weights = weights_ + r * (kKeys / kPack);
    const int64_t padded_count = padded(tile_.count);
    if (begin >= end) {
      for (int64_t j = 0; j < padded_count; ++j) scores[j] = 0.0f;
      Outer::pack_row(scores, padded_count, weights);
      return;
    }
    if (a_.softcap > 0.0f) {
      for (int64_t j = 0; j < tile_.count; j += kWidth) {
        Isa::store(scores + j, Math::score(Isa::load(scores + j), a_.scale, a_.softcap));
      }
    } else {
      for (int64_t j = 0; j < tile_.count; j += kWidth) {
        Isa::store(scores + j, Isa::load(scores + j) * Isa::set(a_.scale));
      }
    }
    for (int64_t j = 0; j < begin; ++j) scores[j] = kNothing;
    for (int64_t j = end; j < padded_count; ++j) scores[j] = kNothing;
    Vec tops = Isa::set(kNothing);
    for (int64_t j = 0; j < padded_count; j += kWidth) tops = Isa::max(tops, Isa::load(scores + j));
    const float tile_top = Isa::max_lane(tops), before = top_[r];
    const float top = tile_top > before ? tile_top : before;
    // Where every score is -inf, any finite origin gives the weights 0 that are wanted.
    const Vec origin = Isa::set(top == kNothing ? 0.0f : top);
    Vec total = Isa::set(0.0f);
    for (int64_t j = 0; j < padded_count; j += kWidth) {
      const Vec weight = Math::exp(Isa::load(scores + j) - origin);
      Isa::store(scores + j, weight);
      total = total + weight;
    }
    Outer::pack_row(scores, padded_count, weights);
    if (top != before) {
      float rescale = 0.0f;
      if (before != kNothing) rescale = Isa::first_lane(Math::exp(Isa::set(before - top)));
      float* const sums = sums_ + r * v_pad_;
      for (int64_t d = 0; d < v_pad_; d += kWidth) {
        Isa::store(sums + d, Isa::load(sums + d) * Isa::set(rescale));
      }
      denominator_[r] *= rescale;
      top_[r] = top;
    }
    denominator_[r] += Isa::sum_lanes(total);
  }

  // Normalize row `r` and write it out.
  void finish(int64_t r) {
    const int64_t query = token_of(r) * a_.q_heads + query_head_of(r);
    const float sink = a_.sinks != nullptr ? a_.sinks[query_head_of(r)] : kNothing;
    const float top = sink > top_[r] ? sink : top_[r];
    const float origin = top == kNothing ? 0.0f : top;
    const float weight = __builtin_expf(top_[r] - origin);
    const float denominator = weight * denominator_[r] + __builtin_expf(sink - origin);
    const float share = denominator == 0.0f ? 0.0f : weight / denominator;
    T* const out = static_cast<T*>(a_.out) + query * a_.v_dim;
    const float* const sums = sums_ + r * v_pad_;
    for (int64_t d = 0; d < a_.v_dim; ++d) from_float(sums[d] * share, out + d);
    a_.lse[query] = origin + __builtin_logf(denominator);
  }

  void pack_queries() {
    const T* const q = reinterpret_cast<const T*>(a_.q.data);
    for (int64_t r = 0; r < rows_; ++r) {
      const T* row = q + token_of(r) * a_.q.token_stride + query_head_of(r) * a_.q.head_stride;
      Matrix::pack_row(row, a_.k_dim, queries_ + r * k_units_);
    }
    for (int64_t i = rows_ * k_units_; i < whole_rows_ * k_units_; ++i) queries_[i] = Unit{};
    for (int64_t i = 0; i < whole_rows_ * (kKeys / kPack); ++i) weights_[i] = Unit{};
  }

  void pack_values() {
    for (int64_t j = 0; j < tile_.count; j += kPack) {
      Unit* const units = values_ + j / kPack * v_pad_;
      const T* rows[kPack];
      for (int64_t n = 0; n < kPack; ++n) rows[n] = j + n < tile_.count ? tile_.v[j + n] : nullptr;
      for (int64_t d = 0; d < a_.v_dim; ++d) {
        T elements[kPack] = {};
        for (int64_t n = 0; n < kPack; ++n) {
          if (rows[n] != nullptr) elements[n] = rows[n][d];
        }
        units[d] = Outer::pack(elements);
      }
      for (int64_t d = a_.v_dim; d < v_pad_; ++d) units[d] = Unit{};
    }
  }
};

template <class Isa, class T>
void prefill_tile(const PrefillArgs& args, int64_t head, int64_t first, int64_t last,
                  float* scratch) {
  PrefillKernel<Isa, T>(args, head, first, last, scratch).run();
}

}  // namespace tamis
