// The prefill kernel, written once over an instruction set `Isa` (isa_*.h).
//
// A tile of queries (the rows: tokens times query heads that share a KV head) meets the keys tile
// by tile, with online softmax: scores = Q K^T, weights = exp(scores - top), sums += weights V. A
// tile of keys holds whatever keys are to be computed, in ascending order, so that each row sees a
// range of it; keys and values are packed for the matrix products straight from the pages.
//
// Which keys share a tile follows from the pattern alone, so the bits of a row do not depend on the
// rows beside it.
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
    int64_t key[kKeys];  // indices: cached tokens first, then the chunk's own
    const T* k[kKeys];
    const T* v[kKeys];
    int64_t position[kKeys];  // only with a window
  };

  const PrefillArgs& a_;
  const QueryTile& work_;
  const int64_t head_, length_;  // the KV head, and its cached tokens
  const int64_t rows_, whole_rows_;
  const int64_t k_units_, v_pad_;  // depth of Q K^T in units; columns of the sums
  float* const sums_;              // [whole_rows_, v_pad_]
  float* const scores_;            // [whole_rows_, kKeys]
  float* const top_;               // [whole_rows_]
  float* const denominator_;       // [whole_rows_]
  Unit* const queries_;            // [whole_rows_, k_units_]
  Unit* const weights_;            // [whole_rows_, kKeys / kPack]
  Unit* const keys_;               // [k_units_, kKeys]
  Unit* const values_;             // [kKeys / kPack, v_pad_]
  int64_t band_ = 0;  // last keys that a row sees of the tiles at work; 0 for all
  Tile tile_;
  typename Matrix::Product product_;

 public:
  PrefillKernel(const PrefillArgs& args, const QueryTile& work, float* scratch)
      : a_(args),
        work_(work),
        head_(work.q_head / (args.q_heads / args.kv_heads)),
        length_(args.lengths != nullptr ? args.lengths[head_ * args.lengths_head_stride] : 0),
        rows_((work.last - work.first) * work.heads),
        whole_rows_(Matrix::whole_rows(rows_)),
        k_units_(Matrix::units(args.k_dim)),
        v_pad_(padded(args.v_dim)),
        sums_(scratch),
        scores_(sums_ + whole_rows_ * v_pad_),
        top_(scores_ + whole_rows_ * kKeys),
        denominator_(top_ + whole_rows_),
        queries_(reinterpret_cast<Unit*>(denominator_ + whole_rows_)),
        weights_(queries_ + whole_rows_ * k_units_),
        keys_(weights_ + whole_rows_ * (kKeys / kPack)),
        values_(keys_ + k_units_ * kKeys) {
    tile_.count = 0;
  }

  void run() {
    pack_queries();
    for (int64_t r = 0; r < whole_rows_; ++r) {
      top_[r] = kNothing;
      denominator_[r] = 0.0f;
    }
    for (int64_t i = 0; i < whole_rows_ * v_pad_; ++i) sums_[i] = 0.0f;
    if (is_full(a_.pattern, work_.q_head)) {
      add(0, length_ + (a_.own ? work_.last : 0));
    } else {
      for_each_run([this](int64_t begin, int64_t end) { add(begin, end); });
      attend();
      band_ = window_of(a_.pattern, work_.q_head);
      if (band_ > 0) add_band();
    }
    attend();
    for (int64_t r = 0; r < rows_; ++r) finish(r);
  }

 private:
  int64_t token_of(int64_t row) const { return work_.first + row / work_.heads; }
  int64_t query_head_of(int64_t row) const { return work_.q_head + row % work_.heads; }

  // Visit, in ascending order, the disjoint runs of keys begin..end that the pattern lists for all
  // rows: blocks, and columns outside of them.
  template <class Visit>
  void for_each_run(Visit visit) const {
    const int64_t size = a_.pattern.block, stop = length_ + work_.last;
    const IndexList blocks = blocks_of(a_.pattern, work_.q_head, work_.first / size);
    const IndexList columns = columns_of(a_.pattern, work_.q_head);
    const int32_t* column = columns.begin;
    for (const int32_t* block = blocks.begin; block < blocks.end && *block * size < stop; ++block) {
      const int64_t begin = *block * size, end = begin + size < stop ? begin + size : stop;
      for (; column < columns.end && *column < begin; ++column) visit(*column, *column + 1);
      while (column < columns.end && *column < end) ++column;
      visit(begin, end);
    }
    for (; column < columns.end && *column < stop; ++column) visit(*column, *column + 1);
  }

  // Attend to the last `band_` keys of each row but for those that the pattern lists.
  void add_band() {
    const int64_t oldest = length_ + work_.first - band_ + 1;
    int64_t at = oldest > 0 ? oldest / kKeys * kKeys : 0;
    const auto add_gap = [this, &at](int64_t begin, int64_t end) {
      while (at < begin) {
        // Tiles end at multiples of kKeys, wherever the rows begin.
        if (tile_.count > 0 && tile_.key[0] / kKeys != at / kKeys) attend();
        const int64_t border = at / kKeys * kKeys + kKeys;
        const int64_t next = border < begin ? border : begin;
        add(at, next);
        at = next;
      }
      if (at < end) at = end;
    };
    for_each_run(add_gap);
    add_gap(length_ + work_.last, 0);
  }

  // Put the keys begin..end into the tile; attend to it whenever it is full.
  void add(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t space = kKeys - tile_.count;
      const int64_t next = begin + space < end ? begin + space : end;
      // A tile that is not seen need not be looked up.
      if (next - begin < kKeys || is_visible(position_of(next - 1))) {
        add_cached(begin, next < length_ ? next : length_);
        add_own(begin > length_ ? begin - length_ : 0, next - length_);
        if (tile_.count == kKeys) attend();
      }
      begin = next;
    }
  }

  // Whether any row may see keys up to `position`, the last of theirs.
  bool is_visible(int64_t position) const {
    return a_.window == 0 || position > a_.positions[work_.first] - a_.window;
  }

  int64_t position_of(int64_t key) const {
    if (key >= length_) return a_.positions[key - length_];
    int32_t position;
    __builtin_memcpy(&position, page_of(key) + a_.position_offset + key % a_.page_size * 4, 4);
    return position;
  }

  const uint8_t* page_of(int64_t key) const {
    return a_.data + a_.tables[head_ * a_.tables_head_stride + key / a_.page_size] * kUnit;
  }

  void add_cached(int64_t begin, int64_t end) {
    while (begin < end) {
      const uint8_t* page = page_of(begin);
      int64_t slot = begin % a_.page_size;
      const T* k = reinterpret_cast<const T*>(page + a_.k_offset) + slot * a_.k_dim;
      const T* v = reinterpret_cast<const T*>(page + a_.v_offset) + slot * a_.v_dim;
      for (; begin < end && slot < a_.page_size; ++begin, ++slot) {
        add_key(begin, k, v);
        k += a_.k_dim;
        v += a_.v_dim;
      }
    }
  }

  // Tokens begin..end of the chunk.
  void add_own(int64_t begin, int64_t end) {
    const T* const k = reinterpret_cast<const T*>(a_.k.data) + head_ * a_.k.head_stride;
    const T* const v = reinterpret_cast<const T*>(a_.v.data) + head_ * a_.v.head_stride;
    for (; begin < end; ++begin) {
      add_key(length_ + begin, k + begin * a_.k.token_stride, v + begin * a_.v.token_stride);
    }
  }

  void add_key(int64_t key, const T* k, const T* v) {
    tile_.key[tile_.count] = key;
    tile_.k[tile_.count] = k;
    tile_.v[tile_.count] = v;
    if (a_.window > 0) tile_.position[tile_.count] = position_of(key);
    ++tile_.count;
  }

  // Let the rows meet the tile of keys, and empty it.
  void attend() {
    const int64_t count = tile_.count;
    if (count > 0 && (a_.window == 0 || is_visible(tile_.position[count - 1]))) multiply();
    tile_.count = 0;
  }

  void multiply() {
    Matrix::pack_columns(tile_.k, tile_.count, a_.k_dim, keys_, kKeys);
    Matrix::pack_rows(tile_.v, tile_.count, a_.v_dim, values_, v_pad_);
    product_.multiply(whole_rows_, queries_, k_units_, keys_, kKeys, k_units_,
                      Matrix::round_up(tile_.count, kWidth), false, scores_, kKeys);
    int64_t begin = 0, end = 0;  // what a row sees: both ascend with its token
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t token = token_of(r), last = length_ + token;
      while (end < tile_.count && tile_.key[end] <= last) ++end;
      if (band_ > 0) {
        while (begin < end && tile_.key[begin] <= last - band_) ++begin;
      }
      if (a_.window > 0) {
        const int64_t before = a_.positions[token] - a_.window;
        while (begin < end && tile_.position[begin] <= before) ++begin;
      }
      soften(r, begin, end);
    }
    product_.multiply(whole_rows_, weights_, kKeys / kPack, values_, v_pad_,
                      Matrix::units(tile_.count), v_pad_, true, sums_, v_pad_);
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
    float scale = a_.scale;
    if (a_.softcap > 0.0f) {
      for (int64_t j = 0; j < tile_.count; j += kWidth) {
        Isa::store(scores + j, Math::score(Isa::load(scores + j), scale, a_.softcap));
      }
      scale = 1.0f;
    }
    for (int64_t j = 0; j < begin; ++j) scores[j] = kNothing;
    for (int64_t j = end; j < padded_count; ++j) scores[j] = kNothing;
    Vec tops = Isa::set(kNothing);
    for (int64_t j = 0; j < padded_count; j += kWidth) tops = Isa::max(tops, Isa::load(scores + j));
    const float tile_top = scale * Isa::max_lane(tops), before = top_[r];
    const float top = tile_top > before ? tile_top : before;
    // Where every score is -inf, any finite origin gives the weights 0 that are wanted.
    const Vec factor = Isa::set(scale), origin = Isa::set(top == kNothing ? 0.0f : -top);
    Vec total = Isa::set(0.0f);
    for (int64_t j = 0; j < padded_count; j += kWidth) {
      const Vec weight = Math::exp(Isa::fma(Isa::load(scores + j), factor, origin));
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
    for (int64_t d = 0; d < a_.v_dim; d += kWidth) {
      const int64_t count = a_.v_dim - d < kWidth ? a_.v_dim - d : kWidth;
      Isa::store(out + d, Isa::load(sums + d) * Isa::set(share), count);
    }
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
};

template <class Isa, class T>
void prefill_tile(const PrefillArgs& args, const QueryTile& tile, float* scratch) {
  PrefillKernel<Isa, T>(args, tile, scratch).run();
}

}  // namespace tamis
