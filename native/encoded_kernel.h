// The kernel of decode over encoded pages, written once over an instruction set `Isa` (isa_*.h,
// ints_*.h).
//
// Codes become 16-bit integers in registers and meet 16-bit integers: for keys the queries times
// the channels' scales, for values the softmax weights times the tokens' scales, rounded to 16 bits
// of the largest. The integer sums are exact; zero-points are summed apart in fp32. Rows in other
// layouts are read as they are, or a few at a time in the first-level cache.
#pragma once

#include "dots.h"
#include "encoded.h"
#include "encoded_scratch.h"
#include "ints.h"
#include "softmax.h"

namespace tamis {

template <class Isa>
class EncodedKernel {
  using Vec = typename Isa::Vec;
  using I = Ints<Isa>;
  using Codes = typename I::Vec;
  static constexpr int kWidth = Isa::kWidth;
  static constexpr int kMostQueries = kWidth == 16 ? 8 : 4;  // whose sums registers hold
  // Sums under way, so that no product waits for the one before it.
  static constexpr int kChains = kWidth == 16 ? 16 : 4;
  static constexpr float kNothing = -__builtin_inff();
  static constexpr float kMost = 32767.0f;

  const EncodedRange& r_;
  const Side &k_, &v_;
  const Partial& partial_;
  const int64_t v_pad_;
  const int64_t k_words_, k_planes_, v_words_, v_planes_;  // as of Side, which divides
  EncodedScratch s_;
  Packing keys_, values_;  // rows 0 where codes are not multiplied as such
  const uint8_t* pages_[kEncodedBlock];
  int64_t n_pages_ = 0;  // of the block at work
  const int64_t lines_;  // of the cache, per page
  int64_t ahead_ = 0, ahead_line_ = 0;  // page and line that are prefetched next

 public:
  EncodedKernel(const EncodedRange& range, float* scratch, const Partial& partial)
      : r_(range),
        k_(range.k),
        v_(range.v),
        partial_(partial),
        v_pad_(padded(range.v.dim)),
        k_words_(range.k.words()),
        k_planes_(range.k.planes()),
        v_words_(range.v.words()),
        v_planes_(range.v.planes()),
        keys_(packing_of_keys(range.k, range.page_size, I::kBytes)),
        values_(packing_of_values(range.v, range.page_size, I::kBytes)),
        lines_((range.page_bytes + 63) / 64) {
    carve(range, I::kBytes, scratch, &s_);
  }

  void run() {
    prepare();
    const int64_t step = block_pages(r_.page_size);
    ahead_ = r_.begin;
    prefetch(step * lines_);
    for (int64_t begin = r_.begin; begin < r_.end; begin += step) {
      n_pages_ = r_.end - begin < step ? r_.end - begin : step;
      for (int64_t i = 0; i < n_pages_; ++i) pages_[i] = page(begin + i);
      if (keys_.rows > 0) scale_queries();
      for (int64_t i = 0; i < n_pages_; ++i) {
        score_page(pages_[i], i * r_.page_size);
        if (keys_.rows == 0) prefetch(lines_ / 2);
      }
      for (int64_t g = 0; g < r_.group; ++g) {
        s_.rescale[g] = soften<Isa>(scores(g), n_pages_ * r_.page_size, r_.scale, r_.softcap,
                                    partial_.top + g, partial_.denominator + g);
      }
      add_values();
      prefetch_until(begin + 2 * step);
    }
    if (values_.rows > 0) unpack_sums();
  }

 private:
  float* scores(int64_t g) const { return s_.scores + g * s_.score_stride; }
  const float* query(int64_t g) const { return s_.q + g * padded(k_.dim); }
  float* sums(int64_t g) const { return partial_.sums + g * v_pad_; }

  const uint8_t* page(int64_t entry) const { return r_.data + r_.table[entry] * kUnit; }

  // Bring the next `count` lines of the range into the second-level cache. A few at a time, because
  // what is read meanwhile must not wait behind them.
  void prefetch(int64_t count) {
    while (count > 0 && ahead_ < r_.end) {
      const int64_t left = lines_ - ahead_line_, n = count < left ? count : left;
      const uint8_t* const at = page(ahead_) + ahead_line_ * 64;
      for (int64_t i = 0; i < n; ++i) __builtin_prefetch(at + i * 64, 0, 2);
      count -= n;
      ahead_line_ += n;
      if (ahead_line_ == lines_) ++ahead_, ahead_line_ = 0;
    }
  }

  // The same for all lines before the page `end`.
  void prefetch_until(int64_t end) {
    while (ahead_ < end && ahead_ < r_.end) prefetch(lines_ - ahead_line_);
  }

  template <class P>
  struct Pointee;
  template <class T>
  struct Pointee<const T*> {
    using type = T;
  };
  template <class P>
  using Element = typename Pointee<P>::type;

  // Call f with a pointer to the field at `offset` of the page, of the element type.
  template <class F>
  static void typed(DType dtype, const uint8_t* page, int64_t offset, F f) {
    const uint8_t* const field = page + offset;
    if (dtype == DType::bf16) {
      f(reinterpret_cast<const Bf16*>(field));
    } else if (dtype == DType::fp16) {
      f(reinterpret_cast<const Fp16*>(field));
    } else {
      f(reinterpret_cast<const float*>(field));
    }
  }

  template <int N>
  struct Number {
    static constexpr int value = N;
  };

  // Call f(Number<N>, first query) for all queries of the group, at most `Most` of them at a time.
  template <int Most = 4, class F>
  void by_queries(F f, int64_t g = 0) const {
    for (; g + Most <= r_.group; g += Most) f(Number<Most>{}, g);
    if constexpr (Most > 1) by_queries<Most / 2>(f, g);
  }

  // Call f(Number<R>) for R rows per vector, a power of two.
  template <int R = kWidth, class F>
  static void by_rows(int64_t rows, F f) {
    if constexpr (R > 1) {
      if (rows != R) return by_rows<R / 2>(rows, f);
    }
    f(Number<R>{});
  }

  void prepare() {
    for (int64_t g = 0; g < r_.group; ++g) {
      float* const to = s_.q + g * padded(k_.dim);
      typed(r_.q_dtype, static_cast<const uint8_t*>(r_.q), 0, [&](const auto* q) {
        for (int64_t d = 0; d < k_.dim; ++d) to[d] = to_float(q[g * r_.q_stride + d]);
      });
      for (int64_t d = k_.dim; d < padded(k_.dim); ++d) to[d] = 0.0f;
      partial_.top[g] = kNothing;
      partial_.denominator[g] = 0.0f;
    }
    for (int64_t i = 0; i < r_.group * v_pad_; ++i) partial_.sums[i] = 0.0f;
    if (k_.rows == Rows::plain) pack_queries(nullptr);
    if (keys_.rows > 0) {
      for (int64_t i = 0; i < r_.group * s_.q16_stride; ++i) s_.q16[i] = 0;
    }
    if (values_.rows > 0) {
      for (int64_t i = 0; i < r_.group * s_.plane_stride; ++i) s_.plane_sums[i] = 0.0f;
      for (int64_t i = 0; i < r_.group * values_.groups * kWidth; ++i) s_.zeros[i] = 0.0f;
    }
    s_.mask_of = nullptr;
  }

  // --- keys -----------------------------------------------------------------------------------

  // Products of all queries with a page's keys, from scores[t0] on.
  void score_page(const uint8_t* page, int64_t t0) {
    if (keys_.rows > 0) {
      score_codes(page, t0);
    } else if (k_.packed()) {
      for (int64_t t = 0; t < r_.page_size; t += kDecodedRows) {
        const int64_t n = r_.page_size - t < kDecodedRows ? r_.page_size - t : kDecodedRows;
        dequantize(k_, page, t, n);
        score_rows<float>(s_.q, s_.rows, padded(k_.dim), k_.dim, n, t0 + t);
      }
    } else {
      const bool pruned = k_.rows == Rows::pruned;
      if (pruned) pack_queries(page + k_.mask);
      const int64_t dim = pruned ? k_.kept : k_.dim;
      typed(k_.dtype, page, k_.elements, [&](const auto* rows) {
        using T = Element<decltype(rows)>;
        for (int64_t t = 0; t < r_.page_size; t += kBlock) {
          const int64_t n = r_.page_size - t < kBlock ? r_.page_size - t : kBlock;
          score_rows<T>(s_.packed_q, rows + t * dim, dim, dim, n, t0 + t);
        }
      });
    }
    if (k_.rank > 0) add_low_rank_scores(page, t0);
    if (k_.outliers > 0) {
      for_outliers(k_, page, [&](int64_t t, int64_t c, float added) {
        for (int64_t g = 0; g < r_.group; ++g) scores(g)[t0 + t] += query(g)[c] * added;
      });
    }
  }

  // The queries as inner products with stored rows take them, without the channels that `mask`
  // lacks (null for all).
  void pack_queries(const uint8_t* mask) {
    if (mask != nullptr) {
      if (s_.mask_of != nullptr && __builtin_memcmp(mask, s_.mask_of, k_.dim) == 0) return;
      s_.mask_of = mask;
    }
    const int64_t dim = mask == nullptr ? k_.dim : k_.kept;
    for (int64_t g = 0; g < r_.group; ++g) {
      float* const kept = s_.rows;
      int64_t n = 0;
      for (int64_t d = 0; d < k_.dim; ++d) {
        if ((mask == nullptr || mask[d] != 0) && n < dim) kept[n++] = query(g)[d];
      }
      while (n < padded(dim)) kept[n++] = 0.0f;
      typed(k_.dtype, nullptr, 0, [&](const auto* type) {
        using T = Element<decltype(type)>;
        using Query = typename Isa::template Dot<T>::Query;
        Query* const to = reinterpret_cast<Query*>(s_.packed_q) + g * padded(dim);
        for (int64_t d = 0; d < padded(dim); ++d) {
          T element;
          from_float(kept[d], &element);
          to[d] = Isa::template Dot<T>::query(element);
        }
      });
    }
  }

  template <class T>
  void score_rows(const void* queries, const T* rows, int64_t stride, int64_t dim, int64_t n,
                  int64_t t) {
    using Query = typename Isa::template Dot<T>::Query;
    const T* keys[kBlock + kWidth];
    for (int64_t i = 0; i < n; ++i) keys[i] = rows + i * stride;
    for (int64_t i = n; i % kWidth; ++i) keys[i] = keys[n - 1];
    by_queries([&](auto number, int64_t g) {
      dot_products<Isa, T, decltype(number)::value>(
          static_cast<const Query*>(queries) + g * padded(dim), padded(dim), keys, n, dim,
          scores(g) + t, s_.score_stride);
    });
  }

  // Products with codes, group of tokens by group of tokens: scale and zero-point per channel. The
  // words of two vectors of tokens are turned so that lanes are tokens, once for all queries:
  // adding up the lanes of each product would cost more than the product.
  void score_codes(const uint8_t* page, int64_t t0) {
    for (int64_t first = 0; first < r_.page_size; first += k_.group) {
      const int64_t unit = (t0 + first) / k_.group;
      const float* const scales = s_.k_scale + unit * padded(k_.dim);
      for (int64_t g = 0; g < r_.group; ++g) {
        const float share = s_.share[unit * r_.group + g];
        round16(query(g), scales, k_.dim, share, s_.q16 + g * s_.q16_stride);
      }
      const uint8_t* const codes = page + k_.elements + first * k_words_ * 2;
      for (int64_t t = 0; t < k_.group; t += 2 * kWidth) {
        by_rows(keys_.rows, [&](auto rows) { turn_codes<decltype(rows)::value>(codes, t); });
        prefetch(2 * kWidth * k_words_ * 2 / 64 + 1);
        by_queries<kMostQueries>([&](auto number, int64_t g) {
          constexpr int N = decltype(number)::value;
          if (k_.group - t > kWidth) {
            multiply_codes<N, 2>(t0 + first + t, g, unit);
          } else {
            multiply_codes<N, 1>(t0 + first + t, g, unit);
          }
        });
      }
    }
  }

  // step, share and base = q . zero of the block's groups of tokens, [groups, queries]. For all at
  // once, because each is the end of a chain of operations that wait for each other.
  void scale_queries() {
    const int64_t per_page = r_.page_size / k_.group, units = n_pages_ * per_page;
    for (int64_t unit = 0; unit < units; ++unit) {
      const uint8_t* const page = pages_[unit / per_page];
      const int64_t at = unit % per_page * k_.dim;
      typed(k_.dtype, page, k_.scale, [&](const auto* scale) {
        const auto* const zero = reinterpret_cast<decltype(scale)>(page + k_.zero);
        by_queries([&](auto number, int64_t g) {
          scale_queries<decltype(number)::value>(scale + at, zero + at, unit, g);
        });
      });
    }
    choose_steps(units * r_.group);
    for (int64_t i = 0; i < units * r_.group; i += kWidth) {
      Isa::store(s_.base + i, reduced(s_.bases + i * kWidth, [](Vec a, Vec b) { return a + b; }));
    }
  }

  // tops and bases of N queries from `g` for a group of tokens, and the group's scales.
  template <int N, class T>
  void scale_queries(const T* scale, const T* zero, int64_t unit, int64_t g) {
    const int64_t dim = k_.dim, whole = dim / kWidth * kWidth, pad = padded(dim);
    const float* const q = query(g);
    float* const scales_to = s_.k_scale + unit * pad;
    Vec tops[N], bases[N];
    for (int i = 0; i < N; ++i) tops[i] = bases[i] = Isa::set(0.0f);
    const auto multiply = [&](int64_t d, Vec scales, Vec zeros) {
      Isa::store(scales_to + d, scales);
      for (int i = 0; i < N; ++i) {
        const Vec channels = Isa::load(q + i * pad + d);
        tops[i] = Isa::max(tops[i], I::magnitude(channels * scales));
        bases[i] = Isa::fma(channels, zeros, bases[i]);
      }
    };
    for (int64_t d = 0; d < whole; d += kWidth) {
      multiply(d, Isa::load(scale + d), Isa::load(zero + d));
    }
    if (const int64_t left = dim - whole; left > 0) {
      multiply(whole, Isa::load(scale + whole, left), Isa::load(zero + whole, left));
    }
    const int64_t at = (unit * r_.group + g) * kWidth;
    for (int i = 0; i < N; ++i) {
      Isa::store(s_.tops + at + i * kWidth, tops[i]);
      Isa::store(s_.bases + at + i * kWidth, bases[i]);
    }
  }

  // step and share of `count` sets of numbers, whose largest are the largest lanes of tops: numbers
  // times share are 16-bit integers, of which 1 stands for step. Writes whole vectors.
  void choose_steps(int64_t count) const {
    for (int64_t i = 0; i < count; i += kWidth) {
      const Vec most = reduced(s_.tops + i * kWidth, [](Vec a, Vec b) { return Isa::max(a, b); });
      Isa::store(s_.step + i, most * Isa::set(1.0f / kMost));
      Isa::store(s_.share + i, Isa::zero_below(Isa::set(kMost) / most, most, 1e-30f));
    }
  }

  // `count` products a b share as 16-bit integers; reads and writes two whole vectors at a time.
  static void round16(const float* a, const float* b, int64_t count, float share, int16_t* to) {
    const Vec shares = Isa::set(share);
    for (int64_t i = 0; i < count; i += 2 * kWidth) {
      I::store16(to + i, Isa::load(a + i) * Isa::load(b + i),
                 Isa::load(a + i + kWidth) * Isa::load(b + i + kWidth), shares);
    }
  }

  // Lane i is the sum, or what else `f` makes of two, of the lanes of the i-th vector.
  template <class F>
  static Vec reduced(const float* vectors, F f) {
    Vec v[kWidth];
    for (int i = 0; i < kWidth; ++i) v[i] = Isa::load(vectors + i * kWidth);
    return reduced<kWidth>(v, f);
  }

  template <int N, class F>
  static Vec reduced(Vec* v, F f) {
    if constexpr (N > 1) {
      for (int i = 0; i < N / 2; ++i) {
        const Codes a = I::bits(v[2 * i]), b = I::bits(v[2 * i + 1]);
        v[i] = f(I::from_bits(I::even(a, b)), I::from_bits(I::odd(a, b)));
      }
      return reduced<N / 2>(v, f);
    }
    return v[0];
  }

  // s_.columns = the words of a group's tokens from `t` on, two channels times a vector of tokens
  // each, of one or two vectors of tokens; to whole vectors the last tokens are repeated.
  template <int R>
  void turn_codes(const uint8_t* codes, int64_t t) {
    constexpr int kColumns = kWidth / R;
    const int64_t row_bytes = k_words_ * 2;
    const int64_t sets = k_.group - t > kWidth ? 2 : 1;
    for (int64_t set = 0; set < sets; ++set) {
      for (int64_t v = 0; v < keys_.vectors; ++v) {
        Codes words[kColumns];
        for (int i = 0; i < kColumns; ++i) {
          const int64_t row = t + set * kWidth + i * R;
          const int64_t last = k_.group - R;
          words[i] = load_words<R>(codes + (row < last ? row : last) * row_bytes, row_bytes, v);
        }
        turn<kColumns>(words);
        uint8_t* const to = s_.columns + (v * kWidth * sets + set) * I::kBytes;
        for (int i = 0; i < kColumns; ++i) I::store(to + i * sets * I::kBytes, words[i]);
      }
    }
  }

  // A vector's width of rows of `Columns` 32-bit numbers, one after the other, become columns.
  template <int Columns>
  static void turn(Codes* v) {
    if constexpr (Columns > 1) {
      constexpr int kHalf = Columns / 2;
      Codes even[kHalf], odd[kHalf];
      for (int i = 0; i < kHalf; ++i) {
        even[i] = I::even(v[2 * i], v[2 * i + 1]);
        odd[i] = I::odd(v[2 * i], v[2 * i + 1]);
      }
      turn<kHalf>(even);
      turn<kHalf>(odd);
      for (int i = 0; i < kHalf; ++i) v[2 * i] = even[i], v[2 * i + 1] = odd[i];
    }
  }

  // Products of N queries from `g` with the T vectors of tokens of s_.columns.
  template <int N, int T>
  void multiply_codes(int64_t t, int64_t g, int64_t unit) {
    constexpr int kColumns = kChains > N * T ? kChains / (N * T) : 1;
    const int64_t pairs = (k_words_ + 1) / 2, whole = pairs / kColumns * kColumns;
    Codes products[kColumns][N][T];
    for (int c = 0; c < kColumns; ++c) {
      for (int i = 0; i < N; ++i) {
        for (int j = 0; j < T; ++j) products[c][i][j] = I::zero();
      }
    }
    int64_t pair = 0;
    for (; pair < whole; pair += kColumns) multiply_columns<kColumns, N, T>(pair, g, products);
    for (; pair < pairs; ++pair) multiply_columns<1, N, T>(pair, g, products);
    for (int i = 0; i < N; ++i) {
      const int64_t at = unit * r_.group + g + i;
      const Vec step = Isa::set(s_.step[at]), base = Isa::set(s_.base[at]);
      for (int j = 0; j < T; ++j) {
        Codes sum = products[0][i][j];
        for (int c = 1; c < kColumns; ++c) sum = I::add(sum, products[c][i][j]);
        // What lies beyond the group is overwritten by the next one, or padding.
        Isa::store(scores(g + i) + t + j * kWidth, Isa::fma(I::to_float(sum), step, base));
      }
    }
  }

  // Add the products with `Columns` columns from `pair` on, to sums of their own, for a product
  // must not wait for the one before it.
  template <int Columns, int N, int T>
  void multiply_columns(int64_t pair, int64_t g, Codes (*products)[N][T]) const {
    const int64_t planes = k_planes_, words_per_row = k_words_, q_stride = s_.q16_stride;
    const int bits = static_cast<int>(k_.bits);
    const Codes mask = I::set16(static_cast<int16_t>((1 << bits) - 1));
    const typename I::Shift shift = I::shift(bits);
    const int16_t* q = s_.q16 + g * q_stride + 2 * pair;
    Codes words[Columns][T];
    for (int c = 0; c < Columns; ++c) {
      for (int j = 0; j < T; ++j) {
        words[c][j] = I::load(s_.columns + ((pair + c) * T + j) * I::kBytes);
      }
    }
    for (int64_t p = 0; p < planes; ++p, q += words_per_row) {
      for (int c = 0; c < Columns; ++c) {
        Codes plane[T];
        for (int j = 0; j < T; ++j) {
          plane[j] = I::both(words[c][j], mask);
          words[c][j] = I::shifted(words[c][j], shift);
        }
        for (int i = 0; i < N; ++i) {
          const Codes channels = I::template repeat<kWidth>(q + i * q_stride + 2 * c);
          for (int j = 0; j < T; ++j) {
            products[c][i][j] = I::dot(products[c][i][j], channels, plane[j]);
          }
        }
      }
    }
  }

  // Vector `v` of the words of R rows that begin at `row`.
  template <int R>
  static Codes load_words(const uint8_t* row, int64_t row_bytes, int64_t v) {
    if constexpr (R > 1) return I::load(row);
    const int64_t left = row_bytes - v * I::kBytes;
    return left >= I::kBytes ? I::load(row + v * I::kBytes) : I::load(row + v * I::kBytes, left);
  }

  void add_low_rank_scores(const uint8_t* page, int64_t t0) {
    transpose_left(k_, page);
    typed(k_.dtype, page, k_.right, [&](const auto* right) {
      for (int64_t i = 0; i < k_.rank; ++i) {
        float* const row = s_.rows;
        for (int64_t d = 0; d < k_.dim; ++d) row[d] = to_float(right[i * k_.dim + d]);
        for (int64_t d = k_.dim; d < padded(k_.dim); ++d) row[d] = 0.0f;
        for (int64_t g = 0; g < r_.group; ++g) {
          Vec total = Isa::set(0.0f);
          for (int64_t d = 0; d < k_.dim; d += kWidth) {
            total = Isa::fma(Isa::load(query(g) + d), Isa::load(row + d), total);
          }
          const float product = Isa::sum_lanes(total);
          const float* const left = s_.left + i * s_.score_stride;
          for (int64_t t = 0; t < r_.page_size; ++t) scores(g)[t0 + t] += product * left[t];
        }
      }
    });
  }

  // --- both -----------------------------------------------------------------------------------

  // s_.left = the left factor of a page's correction, [rank, page_size].
  void transpose_left(const Side& side, const uint8_t* page) {
    typed(side.dtype, page, side.left, [&](const auto* left) {
      for (int64_t t = 0; t < r_.page_size; ++t) {
        for (int64_t i = 0; i < side.rank; ++i) {
          s_.left[i * s_.score_stride + t] = to_float(left[t * side.rank + i]);
        }
      }
    });
  }

  // Call f(token, channel, number) for each outlier of a page.
  template <class F>
  void for_outliers(const Side& side, const uint8_t* page, F f) const {
    const float share = 1.0f / static_cast<float>(side.dim);
    typed(side.dtype, page, side.added, [&](const auto* added) {
      const auto each = [&](const auto* places) {
        for (int64_t i = 0; i < side.outliers; ++i) {
          const int64_t place = places[i];
          // Exact: pages have less than 2^22 elements.
          const int64_t t = static_cast<int64_t>((static_cast<float>(place) + 0.5f) * share);
          f(t, place - t * side.dim, to_float(added[i]));
        }
      };
      if (side.wide_places) {
        each(reinterpret_cast<const int32_t*>(page + side.places));
      } else {
        each(reinterpret_cast<const int16_t*>(page + side.places));
      }
    });
  }

  // s_.rows = the rows first..first + n of a page's codes, in fp32.
  void dequantize(const Side& side, const uint8_t* page, int64_t first, int64_t n) {
    const int64_t words = side.words(), planes = side.planes(), dim = side.dim;
    const uint16_t mask = static_cast<uint16_t>((1u << side.bits) - 1);
    const int64_t groups = dim / (side.rows == Rows::by_token ? side.group : 1);
    typed(side.dtype, page, side.scale, [&](const auto* scales) {
      const auto* zeros = reinterpret_cast<decltype(scales)>(page + side.zero);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t t = first + i;
        const uint16_t* row = reinterpret_cast<const uint16_t*>(page + side.elements) + t * words;
        float* const to = s_.rows + i * padded(dim);
        for (int64_t p = 0; p < planes; ++p) {
          const int64_t begin = p * words;
          const int64_t count = dim - begin < words ? dim - begin : words;
          for (int64_t h = 0; h < count; ++h) {
            to[begin + h] = static_cast<float>((row[h] >> (p * side.bits)) & mask);
          }
        }
        if (side.rows == Rows::by_channel) {
          const auto *scale = scales + t / side.group * dim, *zero = zeros + t / side.group * dim;
          for (int64_t d = 0; d < dim; ++d) to[d] = to[d] * to_float(scale[d]) + to_float(zero[d]);
        } else {
          for (int64_t j = 0; j < groups; ++j) {
            const float scale = to_float(scales[t * groups + j]);
            const float zero = to_float(zeros[t * groups + j]);
            for (int64_t d = j * side.group; d < (j + 1) * side.group; ++d) {
              to[d] = to[d] * scale + zero;
            }
          }
        }
        for (int64_t d = dim; d < padded(dim); ++d) to[d] = 0.0f;
      }
    });
  }

  // --- values ---------------------------------------------------------------------------------

  // Add the block's values, weighted, to the sums.
  void add_values() {
    if (values_.rows > 0) add_codes();
    if (values_.rows == 0 || v_.rank > 0 || v_.outliers > 0) {
      for (int64_t g = 0; g < r_.group; ++g) {
        for (int64_t d = 0; d < v_.dim; ++d) sums(g)[d] *= s_.rescale[g];
      }
    }
    for (int64_t i = 0; i < n_pages_; ++i) {
      const uint8_t* const page = pages_[i];
      const int64_t t0 = i * r_.page_size;
      if (values_.rows == 0) add_rows_of(page, t0);
      if (v_.rank > 0) add_low_rank_values(page, t0);
      if (v_.outliers > 0) {
        for_outliers(v_, page, [&](int64_t t, int64_t c, float added) {
          for (int64_t g = 0; g < r_.group; ++g) sums(g)[c] += scores(g)[t0 + t] * added;
        });
      }
    }
  }

  void add_rows_of(const uint8_t* page, int64_t t0) {
    if (v_.packed()) {
      for (int64_t t = 0; t < r_.page_size; t += kDecodedRows) {
        const int64_t n = r_.page_size - t < kDecodedRows ? r_.page_size - t : kDecodedRows;
        dequantize(v_, page, t, n);
        add_rows(s_.rows, padded(v_.dim), n, t0 + t);
      }
    } else {
      typed(v_.dtype, page, v_.elements,
            [&](const auto* rows) { add_rows(rows, v_.dim, r_.page_size, t0); });
    }
  }

  // Add `n` weighted rows; the weights begin at scores[t].
  template <class T>
  void add_rows(const T* rows, int64_t stride, int64_t n, int64_t t) {
    by_queries([&](auto number, int64_t g) {
      constexpr int N = decltype(number)::value;
      int64_t d = 0;
      for (; d + 4 * kWidth <= v_.dim; d += 4 * kWidth) {
        add_columns<N, 4>(rows + d, stride, n, g, t, d,
                          [](const T* row, int i) { return Isa::load(row + i * kWidth); });
      }
      for (; d + kWidth <= v_.dim; d += kWidth) {
        add_columns<N, 1>(rows + d, stride, n, g, t, d,
                          [](const T* row, int) { return Isa::load(row); });
      }
      if (const int64_t left = v_.dim - d; left > 0) {
        add_columns<N, 1>(rows + d, stride, n, g, t, d,
                          [left](const T* row, int) { return Isa::load(row, left); });
      }
    });
  }

  template <int N, int D, class T, class Load>
  void add_columns(const T* rows, int64_t stride, int64_t n, int64_t g, int64_t t, int64_t d,
                   Load load) {
    Vec total[N][D];
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < D; ++j) total[i][j] = Isa::load(sums(g + i) + d + j * kWidth);
    }
    for (int64_t row = 0; row < n; ++row, rows += stride) {
      Vec values[D];
      for (int j = 0; j < D; ++j) values[j] = load(rows, j);
      for (int i = 0; i < N; ++i) {
        const Vec weight = Isa::set(scores(g + i)[t + row]);
        for (int j = 0; j < D; ++j) total[i][j] = Isa::fma(weight, values[j], total[i][j]);
      }
    }
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < D; ++j) Isa::store(sums(g + i) + d + j * kWidth, total[i][j]);
    }
  }

  void add_low_rank_values(const uint8_t* page, int64_t t0) {
    transpose_left(v_, page);
    typed(v_.dtype, page, v_.right, [&](const auto* right) {
      for (int64_t i = 0; i < v_.rank; ++i) {
        const float* const left = s_.left + i * s_.score_stride;
        for (int64_t g = 0; g < r_.group; ++g) {
          float product = 0.0f;
          for (int64_t t = 0; t < r_.page_size; ++t) product += scores(g)[t0 + t] * left[t];
          const auto* const row = right + i * v_.dim;
          for (int64_t d = 0; d < v_.dim; ++d) sums(g)[d] += product * to_float(row[d]);
        }
      }
    });
  }

  // Products of the block's weights with codes: the scale and zero-point are per token and group
  // of channels. Words of two tokens or more lie side by side, so that a product of pairs sums over
  // tokens; lanes run along words, so sums stay in the order of words until `unpack_sums`.
  void add_codes() {
    by_rows(values_.rows, [&](auto rows) { join_tokens<decltype(rows)::value>(); });
    turn_scales();
    by_queries([&](auto number, int64_t g) { weigh<decltype(number)::value>(g); });
    choose_steps(r_.group);
    round_weights();
    by_rows(values_.rows, [&](auto rows) {
      by_queries<kMostQueries>([&](auto number, int64_t g) {
        multiply_values<decltype(rows)::value, decltype(number)::value>(g);
      });
    });
  }

  // Tokens whose words lie side by side, for R rows per vector, and the vectors that hold them.
  template <int R>
  static constexpr int kJoined = R > 1 ? R : 2;
  template <int R>
  static constexpr int kHalves = R > 1 ? 1 : 2;

  // s_.joined = the block's words.
  template <int R>
  void join_tokens() {
    const int64_t row_bytes = v_words_ * 2, vectors = values_.vectors;
    uint8_t* to = s_.joined;
    for (int64_t i = 0; i < n_pages_; ++i) {
      const uint8_t* const codes = pages_[i] + v_.elements;
      for (int64_t t = 0; t < r_.page_size; t += kJoined<R>) {
        const uint8_t* const row = codes + t * row_bytes;
        if constexpr (R > 1) {
          I::store(to, I::template join<R>(I::load(row)));
          to += I::kBytes;
        } else {
          for (int64_t v = 0; v < vectors; ++v) {
            const Codes a = load_words<1>(row, row_bytes, v);
            const Codes b = load_words<1>(row + row_bytes, row_bytes, v);
            I::store(to, I::low_pairs(a, b));
            I::store(to + I::kBytes, I::high_pairs(a, b));
            to += 2 * I::kBytes;
          }
        }
      }
    }
  }

  // s_.v_scale, s_.v_zero = those of the block, [groups, tokens]; zero to whole vectors.
  void turn_scales() {
    const int64_t size = r_.page_size, tokens = n_pages_ * size, groups = values_.groups;
    const bool whole = size % kWidth == 0 && kWidth % groups == 0;
    for (int64_t i = 0; i < n_pages_; ++i) {
      typed(v_.dtype, pages_[i], v_.scale, [&](const auto* scale) {
        const auto* const zero = reinterpret_cast<decltype(scale)>(pages_[i] + v_.zero);
        if (whole) {
          by_rows(groups, [&](auto number) {
            turn_numbers<decltype(number)::value>(scale, s_.v_scale + i * size);
            turn_numbers<decltype(number)::value>(zero, s_.v_zero + i * size);
          });
          return;
        }
        for (int64_t group = 0; group < groups; ++group) {
          float* const to = s_.v_scale + group * s_.token_stride + i * size;
          float* const zero_to = s_.v_zero + group * s_.token_stride + i * size;
          for (int64_t t = 0; t < size; ++t) {
            to[t] = to_float(scale[t * groups + group]);
            zero_to[t] = to_float(zero[t * groups + group]);
          }
        }
      });
    }
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t t = tokens; t % kWidth != 0; ++t) {
        s_.v_scale[group * s_.token_stride + t] = s_.v_zero[group * s_.token_stride + t] = 0.0f;
      }
    }
  }

  // Numbers of a page, [tokens, Groups], as floats, [Groups, token_stride].
  template <int Groups, class T>
  void turn_numbers(const T* from, float* to) const {
    for (int64_t t = 0; t < r_.page_size; t += kWidth, from += Groups * kWidth) {
      Codes numbers[Groups];
      for (int i = 0; i < Groups; ++i) numbers[i] = I::bits(Isa::load(from + i * kWidth));
      turn<Groups>(numbers);
      for (int i = 0; i < Groups; ++i) I::store(to + i * s_.token_stride + t, numbers[i]);
    }
  }

  // tops of the weights of N queries from `g` times scales; the zero-points' part of their sums.
  template <int N>
  void weigh(int64_t g) {
    const int64_t groups = values_.groups, tokens = n_pages_ * r_.page_size;
    const float* const weights = scores(g);  // zero to a whole number of vectors
    Vec tops[N];
    for (int i = 0; i < N; ++i) tops[i] = Isa::set(0.0f);
    for (int64_t group = 0; group < groups; ++group) {
      const float* const scales = s_.v_scale + group * s_.token_stride;
      const float* const zeros = s_.v_zero + group * s_.token_stride;
      Vec sums[N];
      for (int i = 0; i < N; ++i) {
        sums[i] = Isa::load(zeros_of(g + i, group)) * Isa::set(s_.rescale[g + i]);
      }
      for (int64_t t = 0; t < tokens; t += kWidth) {
        const Vec scale = Isa::load(scales + t), zero = Isa::load(zeros + t);
        for (int i = 0; i < N; ++i) {
          const Vec weight = Isa::load(weights + i * s_.score_stride + t);
          tops[i] = Isa::max(tops[i], I::magnitude(weight * scale));
          sums[i] = Isa::fma(weight, zero, sums[i]);
        }
      }
      for (int i = 0; i < N; ++i) Isa::store(zeros_of(g + i, group), sums[i]);
    }
    for (int i = 0; i < N; ++i) Isa::store(s_.tops + (g + i) * kWidth, tops[i]);
  }

  // w16 = 16-bit integers of weights times scales / step, [queries, groups, tokens].
  void round_weights() {
    const int64_t groups = values_.groups, tokens = n_pages_ * r_.page_size;
    for (int64_t g = 0; g < r_.group; ++g) {
      for (int64_t group = 0; group < groups; ++group) {
        // What lies between the tokens and a whole number of vectors is not read.
        round16(scores(g), s_.v_scale + group * s_.token_stride, tokens, s_.share[g],
                s_.w16 + (g * groups + group) * s_.token_stride);
      }
    }
  }

  // A vector whose lanes add up to the zero-points' part of a query's sums in a group of channels.
  float* zeros_of(int64_t g, int64_t group) const {
    return s_.zeros + (g * values_.groups + group) * kWidth;
  }

  // Add the products of N queries from `g` with the block's words, R rows per vector.
  template <int R, int N>
  void multiply_values(int64_t g) {
    const int64_t planes = v_planes_;
    const int64_t lines_per_plane =
        n_pages_ * lines_ / (2 * values_.vectors * planes) + 1;  // half of a block's
    int64_t group = 0, first = 0;  // of channels, and its first: found without dividing
    for (int64_t v = 0; v < values_.vectors; ++v) {
      for (int64_t p = 0; p < planes;) {
        const int64_t channel = p * v_words_ + v * (I::kBytes / 2);
        if (channel >= v_.dim) break;
        while (channel < first || channel >= first + v_.group) {
          group = channel < first ? 0 : group + 1;
          first = group * v_.group;
        }
        const int64_t next = channel + v_words_;
        prefetch(lines_per_plane);
        if (p + 1 < planes && next < v_.dim && next < first + v_.group) {
          prefetch(lines_per_plane);
          multiply_planes<R, N, 2>(g, v, p, group);
          p += 2;
        } else {
          multiply_planes<R, N, 1>(g, v, p, group);
          p += 1;
        }
      }
    }
  }

  // The same for P planes from `p` on, in vector `v` of the words of a row, whose channels belong
  // to one group.
  template <int R, int N, int P>
  void multiply_planes(int64_t g, int64_t v, int64_t p, int64_t group) {
    constexpr int kHere = kHalves<R>;
    constexpr int kAtOnce = kChains > P * kHere * N ? kChains / (P * kHere * N) : 1;
    const int64_t units = n_pages_ * r_.page_size / kJoined<R>, whole = units / kAtOnce * kAtOnce;
    Codes products[kAtOnce][P][kHere][N];
    for (int u = 0; u < kAtOnce; ++u) {
      for (int j = 0; j < P; ++j) {
        for (int h = 0; h < kHere; ++h) {
          for (int i = 0; i < N; ++i) products[u][j][h][i] = I::zero();
        }
      }
    }
    const int bits = static_cast<int>(v_.bits);
    const Codes mask = I::set16(static_cast<int16_t>((1 << bits) - 1));
    typename I::Shift shifts[P];
    for (int j = 0; j < P; ++j) shifts[j] = I::shift(static_cast<int>(p + j) * bits);
    const int64_t unit_bytes = values_.vectors * kHere * I::kBytes;
    const int64_t w_stride = values_.groups * s_.token_stride;
    const uint8_t* words = s_.joined + v * kHere * I::kBytes;
    const int16_t* weights = s_.w16 + g * w_stride + group * s_.token_stride;
    const auto multiply = [&](Codes(*to)[kHere][N]) {
      Codes plane[P][kHere];
      for (int h = 0; h < kHere; ++h) {
        const Codes word = I::load(words + h * I::kBytes);
        for (int j = 0; j < P; ++j) plane[j][h] = I::both(I::shifted(word, shifts[j]), mask);
      }
      for (int i = 0; i < N; ++i) {
        const Codes weight = I::template repeat<2 * kWidth / kJoined<R>>(weights + i * w_stride);
        for (int j = 0; j < P; ++j) {
          for (int h = 0; h < kHere; ++h) to[j][h][i] = I::dot(to[j][h][i], weight, plane[j][h]);
        }
      }
      words += unit_bytes;
      weights += kJoined<R>;
    };
    int64_t unit = 0;
    for (; unit < whole; unit += kAtOnce) {
      for (int u = 0; u < kAtOnce; ++u) multiply(products[u]);
    }
    for (; unit < units; ++unit) multiply(products[0]);
    for (int i = 0; i < N; ++i) {
      const Vec rescale = Isa::set(s_.rescale[g + i]), step = Isa::set(s_.step[g + i]);
      float* to = s_.plane_sums + (g + i) * s_.plane_stride + (v * v_planes_ + p) * kHere * kWidth;
      for (int j = 0; j < P; ++j) {
        for (int h = 0; h < kHere; ++h, to += kWidth) {
          Codes sum = products[0][j][h][i];
          for (int u = 1; u < kAtOnce; ++u) sum = I::add(sum, products[u][j][h][i]);
          Isa::store(to, Isa::fma(I::to_float(sum), step, Isa::load(to) * rescale));
        }
      }
    }
  }

  // Add the sums of codes and zero-points to the sums, channel by channel.
  void unpack_sums() {
    by_rows(values_.rows, [&](auto number) {
      constexpr int R = decltype(number)::value;
      constexpr int kHere = kHalves<R>, kLanes = kJoined<R> / 2;  // lanes per word
      const int64_t words = v_words_, planes = v_planes_, dim = v_.dim, groups = values_.groups;
      for (int64_t g = 0; g < r_.group; ++g) {
        float* const to = sums(g);
        const float* from = s_.plane_sums + g * s_.plane_stride;
        for (int64_t v = 0; v < values_.vectors; ++v) {
          const int64_t here = v * (I::kBytes / 2);
          for (int64_t p = 0; p < planes; ++p, from += kHere * kWidth) {
            for (int64_t word = here; word < words && word < here + I::kBytes / 2; ++word) {
              const int64_t i = word - here, channel = p * words + word;
              if (channel >= dim) break;
              const float* const lanes = from + i % kHere * kWidth + i / kHere * kLanes;
              for (int lane = 0; lane < kLanes; ++lane) to[channel] += lanes[lane];
            }
          }
        }
        for (int64_t group = 0; group < groups; ++group) {
          const float zero = Isa::sum_lanes(Isa::load(zeros_of(g, group)));
          for (int64_t d = group * v_.group; d < (group + 1) * v_.group; ++d) to[d] += zero;
        }
      }
    });
  }
};

template <class Isa>
void attend_encoded(const EncodedRange& range, float* scratch, const Partial& partial) {
  EncodedKernel<Isa>(range, scratch, partial).run();
}

}  // namespace tamis
