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
  static constexpr float kNothing = -__builtin_inff();
  static constexpr float kMost = 32767.0f;

  const EncodedRange& r_;
  const Side &k_, &v_;
  const Partial& partial_;
  const int64_t v_pad_;
  const int64_t k_words_, k_planes_, v_words_, v_planes_;  // as of Side, which divides
  EncodedScratch s_;
  Packing keys_, values_;  // rows 0 where codes are not multiplied as such
  const uint8_t* pages_[kBlock];
  int64_t n_pages_ = 0;  // of the block at work
  int64_t ahead_ = 0, ahead_offset_ = 0;  // page and byte that are prefetched next

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
        values_(packing_of_values(range.v, range.page_size, I::kBytes)) {
    carve(range, I::kBytes, scratch, &s_);
  }

  void run() {
    prepare();
    const int64_t step = block_pages(r_.page_size);
    ahead_ = r_.begin;
    prefetch(step * lines());
    for (int64_t begin = r_.begin; begin < r_.end; begin += step) {
      n_pages_ = r_.end - begin < step ? r_.end - begin : step;
      for (int64_t i = 0; i < n_pages_; ++i) pages_[i] = page(begin + i);
      for (int64_t i = 0; i < n_pages_; ++i) {
        score_page(pages_[i], i * r_.page_size);
        if (keys_.rows == 0) prefetch(lines() / 2);
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

  // Cache lines of a page.
  int64_t lines() const { return (r_.page_bytes + 63) / 64; }

  // Bring the next `count` lines of the range into the second-level cache. A few at a time, because
  // what is read meanwhile must not wait behind them.
  void prefetch(int64_t count) {
    while (count-- > 0 && ahead_ < r_.end) {
      __builtin_prefetch(page(ahead_) + ahead_offset_, 0, 2);
      ahead_offset_ += 64;
      if (ahead_offset_ >= r_.page_bytes) {
        ahead_offset_ = 0;
        ++ahead_;
      }
    }
  }

  // The same for all lines before the page `end`.
  void prefetch_until(int64_t end) {
    while (ahead_ < end && ahead_ < r_.end) prefetch(1);
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

  // Call f(Number<N>, first query) for all queries of the group, N of them at a time.
  template <class F>
  void by_queries(F f) const {
    int64_t g = 0;
    for (; g + 4 <= r_.group; g += 4) f(Number<4>{}, g);
    for (; g + 2 <= r_.group; g += 2) f(Number<2>{}, g);
    for (; g < r_.group; ++g) f(Number<1>{}, g);
  }

  // Call f(Number<R>) for R rows per vector.
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
      for (int64_t i = 0; i < r_.group * kWidth; ++i) s_.zeros[i] = 0.0f;
      index_pairs();
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

  // Products with codes, group of tokens by group of tokens: scale and zero-point per channel.
  void score_codes(const uint8_t* page, int64_t t0) {
    for (int64_t first = 0; first < r_.page_size; first += k_.group) {
      const int64_t at = first / k_.group * k_.dim;
      typed(k_.dtype, page, k_.scale, [&](const auto* scale) {
        using T = Element<decltype(scale)>;
        scale_queries(scale + at, reinterpret_cast<const T*>(page + k_.zero) + at);
      });
      const uint8_t* const codes = page + k_.elements + first * k_words_ * 2;
      by_rows(keys_.rows, [&](auto rows) {
        by_queries([&](auto number, int64_t g) {
          multiply_codes<decltype(rows)::value, decltype(number)::value>(codes, t0 + first, g);
        });
      });
    }
  }

  // q16 = 16-bit integers of q scale / step, base = q . zero.
  template <class T>
  void scale_queries(const T* scale, const T* zero) {
    const int64_t dim = k_.dim, whole = dim / kWidth * kWidth;
    float *const scales = s_.rows, *const zeros = scales + padded(dim);
    for (int64_t d = 0; d < whole; d += kWidth) {
      Isa::store(scales + d, Isa::load(scale + d));
      Isa::store(zeros + d, Isa::load(zero + d));
    }
    if (whole < dim) {
      Isa::store(scales + whole, Isa::load(scale + whole, dim - whole));
      Isa::store(zeros + whole, Isa::load(zero + whole, dim - whole));
    }
    const Vec nothing = Isa::set(0.0f);
    for (int64_t g = 0, group = r_.group; g < group; ++g) {
      const float* const q = query(g);
      Vec top = nothing, base = nothing;
#pragma GCC unroll 4
      for (int64_t d = 0; d < dim; d += kWidth) {
        const Vec scaled = Isa::load(q + d) * Isa::load(scales + d);
        top = Isa::max(top, Isa::max(scaled, nothing - scaled));
        base = Isa::fma(Isa::load(q + d), Isa::load(zeros + d), base);
      }
      const float most = Isa::max_lane(top);
      const Vec share = Isa::set(most > 1e-30f ? kMost / most : 0.0f);
      s_.step[g] = most / kMost;
      s_.base[g] = Isa::sum_lanes(base);
      int16_t* const to = s_.q16 + g * s_.q16_stride;
#pragma GCC unroll 4
      for (int64_t d = 0; d < dim; d += kWidth) {
        I::store16(to + d, Isa::load(q + d) * Isa::load(scales + d) * share);
      }
    }
  }

  // Products of N queries from `g` with the codes of one group of tokens, R rows per vector.
  template <int R, int N>
  void multiply_codes(const uint8_t* codes, int64_t t, int64_t g) {
    constexpr int kStrips = 4;
    const int64_t words_per_row = k_words_, row_bytes = words_per_row * 2;
    const int64_t strips = k_.group / R, vectors = keys_.vectors, q_stride = s_.q16_stride;
    const int bits = static_cast<int>(k_.bits), planes = static_cast<int>(k_planes_);
    const Codes mask = I::set16(static_cast<int16_t>((1 << bits) - 1));
    const int16_t* const q16 = s_.q16 + g * q_stride;
    for (int64_t strip = 0; strip < strips; strip += kStrips) {
      prefetch(kStrips * R * row_bytes / 64 + 1);
      Codes products[N][kStrips];
      for (int i = 0; i < N; ++i) {
        for (int j = 0; j < kStrips; ++j) products[i][j] = I::zero();
      }
      for (int64_t v = 0; v < vectors; ++v) {
        Codes words[kStrips];
        for (int j = 0; j < kStrips; ++j) {
          const int64_t row = (strip + j < strips ? strip + j : strips - 1) * R;
          words[j] = load_words<R>(codes + row * row_bytes, row_bytes, v);
        }
        for (int p = 0; p < planes; ++p) {
          Codes plane[kStrips];
          for (int j = 0; j < kStrips; ++j) plane[j] = I::plane(words[j], p * bits, mask);
          for (int i = 0; i < N; ++i) {
            const Codes q = I::template repeat<R>(q16 + i * q_stride + p * words_per_row +
                                                  v * (I::kBytes / 2));
            for (int j = 0; j < kStrips; ++j) products[i][j] = I::dot(products[i][j], q, plane[j]);
          }
        }
      }
      for (int i = 0; i < N; ++i) {
        const Vec step = Isa::set(s_.step[g + i]), base = Isa::set(s_.base[g + i]);
        float* to = scores(g + i) + t + strip * R;
        add_lanes<kWidth / R, kStrips>(products[i]);
        constexpr int kLeft = kStrips * R / kWidth > 0 ? kStrips * R / kWidth : 1;
        // What lies beyond the group is overwritten by the next one, or padding.
        for (int j = 0; j < kLeft; ++j) {
          Isa::store(to + j * kWidth, Isa::fma(I::to_float(products[i][j]), step, base));
        }
      }
    }
  }

  // Add the `Lanes` lanes of each row of `Count` vectors, until there is one lane left.
  template <int Lanes, int Count>
  static void add_lanes(Codes* v) {
    if constexpr (Lanes > 1) {
      constexpr int kHalf = (Count + 1) / 2;
      for (int j = 0; j < kHalf; ++j) {
        v[j] = I::adjacent(v[2 * j], v[2 * j + 1 < Count ? 2 * j + 1 : 2 * j]);
      }
      add_lanes<Lanes / 2, kHalf>(v);
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
  // of channels. Words of tokens R apart are interleaved, so that a product of pairs sums over
  // tokens; lanes run along words, so sums stay in the order of words until `unpack_sums`.
  void add_codes() {
    interleave();
    for (int64_t g = 0; g < r_.group; ++g) weigh(g);
    by_queries([&](auto number, int64_t g) { multiply_values<decltype(number)::value>(g); });
  }

  // Where lane 2 i and 2 i + 1 of a vector of weights come from, per group of channels: the two
  // tokens of a pair of words.
  void index_pairs() {
    const int64_t rows = values_.rows, groups = values_.groups, lanes = kWidth / rows;
    for (int64_t group = 0; group < groups; ++group) {
      int16_t* const index = s_.index + group * 2 * kWidth;
      for (int64_t i = 0; i < kWidth; ++i) {
        index[2 * i] = static_cast<int16_t>(i / lanes * groups + group);
        index[2 * i + 1] = static_cast<int16_t>((rows + i / lanes) * groups + group);
      }
    }
  }

  void interleave() {
    by_rows(values_.rows, [&](auto number) {
      constexpr int R = decltype(number)::value;
      const int64_t row_bytes = v_words_ * 2, vectors = values_.vectors, size = r_.page_size;
      uint8_t* to = s_.pairs;
      for (int64_t i = 0; i < n_pages_; ++i) {
        const uint8_t* const codes = pages_[i] + v_.elements;
        for (int64_t t = 0; t < size; t += 2 * R) {
          for (int64_t v = 0; v < vectors; ++v) {
            const Codes a = load_words<R>(codes + t * row_bytes, row_bytes, v);
            const Codes b = load_words<R>(codes + (t + R) * row_bytes, row_bytes, v);
            I::store(to, I::low_pairs(a, b));
            I::store(to + I::kBytes, I::high_pairs(a, b));
            to += 2 * I::kBytes;
          }
        }
      }
    });
  }

  // The vectors of 16-bit weights times scales of query `g`, and the zero-points' part of its sums.
  void weigh(int64_t g) {
    const int64_t groups = values_.groups, size = r_.page_size, tokens = n_pages_ * size;
    const int shift = static_cast<int>(__builtin_ctzll(groups));
    float* const weighted = s_.weighted;
    int16_t* const w16 = s_.w16;
    const Vec nothing = Isa::set(0.0f);
    Vec top = nothing;
    Vec zeros = Isa::load(s_.zeros + g * kWidth) * Isa::set(s_.rescale[g]);
    for (int64_t i = 0; i < n_pages_; ++i) {
      typed(v_.dtype, pages_[i], v_.scale, [&](const auto* scale) {
        const auto* const zero = reinterpret_cast<decltype(scale)>(pages_[i] + v_.zero);
        const float* const weights = scores(g) + i * size;
        float* const to = weighted + i * size * groups;
        const int64_t count = size * groups;
#pragma GCC unroll 4
        for (int64_t at = 0; at < count; at += kWidth) {
          const Vec weight = I::spread(weights + (at >> shift), shift);
          const Vec scaled = weight * Isa::load(scale + at);
          zeros = Isa::fma(weight, Isa::load(zero + at), zeros);
          top = Isa::max(top, Isa::max(scaled, nothing - scaled));
          Isa::store(to + at, scaled);
        }
      });
    }
    Isa::store(s_.zeros + g * kWidth, zeros);
    const float most = Isa::max_lane(top);
    const Vec share = Isa::set(most > 1e-30f ? kMost / most : 0.0f);
    s_.step[g] = most / kMost;
#pragma GCC unroll 4
    for (int64_t at = 0, count = tokens * groups; at < count; at += kWidth) {
      I::store16(w16 + at, Isa::load(weighted + at) * share);
    }
    const int64_t pair_tokens = 2 * values_.rows, pairs = tokens / pair_tokens;
    const int64_t stride = r_.group * I::kBytes;
    for (int64_t group = 0; group < groups; ++group) {
      uint8_t* to = weights_of(group, pairs) + g * I::kBytes;
      const int16_t* const index = s_.index + group * 2 * kWidth;
#pragma GCC unroll 4
      for (int64_t p = 0; p < pairs; ++p, to += stride) {
        I::store(to, I::pick(w16 + p * pair_tokens * groups, index));
      }
    }
  }

  // The vectors of weights [pairs, queries] of a group of channels.
  uint8_t* weights_of(int64_t group, int64_t pairs) const {
    return s_.pair_weights + group * pairs * r_.group * I::kBytes;
  }

  // Add the products of N queries from `g` with the block's interleaved words.
  template <int N>
  void multiply_values(int64_t g) {
    const int bits = static_cast<int>(v_.bits);
    const Codes mask = I::set16(static_cast<int16_t>((1 << bits) - 1));
    const int64_t pairs = n_pages_ * r_.page_size / (2 * values_.rows);
    const int64_t pair_bytes = values_.vectors * 2 * I::kBytes;
    const int64_t weight_bytes = r_.group * I::kBytes;
    const int64_t lines_per_plane =
        n_pages_ * lines() / (2 * values_.vectors * v_planes_) + 1;  // half of a block's
    int64_t group = 0, first = 0;  // of channels, and its first: found without dividing
    for (int64_t v = 0; v < values_.vectors; ++v) {
      for (int64_t p = 0; p < v_planes_; ++p) {
        const int64_t channel = p * v_words_ + v * (I::kBytes / 2);
        if (channel >= v_.dim) continue;
        while (channel < first || channel >= first + v_.group) {
          group = channel < first ? 0 : group + 1;
          first = group * v_.group;
        }
        const uint8_t* words = s_.pairs + v * 2 * I::kBytes;
        const uint8_t* weights = weights_of(group, pairs) + g * I::kBytes;
        prefetch(lines_per_plane);
        Codes products[2][N];
        for (int i = 0; i < N; ++i) products[0][i] = products[1][i] = I::zero();
#pragma GCC unroll 2
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const int shift = static_cast<int>(p) * bits;
          const Codes low = I::plane(I::load(words), shift, mask);
          const Codes high = I::plane(I::load(words + I::kBytes), shift, mask);
          for (int i = 0; i < N; ++i) {
            const Codes weight = I::load(weights + i * I::kBytes);
            products[0][i] = I::dot(products[0][i], weight, low);
            products[1][i] = I::dot(products[1][i], weight, high);
          }
          words += pair_bytes;
          weights += weight_bytes;
        }
        for (int i = 0; i < N; ++i) {
          float* to = s_.plane_sums + (g + i) * s_.plane_stride +
                      (v * v_planes_ + p) * 2 * kWidth;
          const Vec rescale = Isa::set(s_.rescale[g + i]), step = Isa::set(s_.step[g + i]);
          for (int half = 0; half < 2; ++half, to += kWidth) {
            Isa::store(to, Isa::fma(I::to_float(products[half][i]), step,
                                    Isa::load(to) * rescale));
          }
        }
      }
    }
  }

  // Add the sums of codes and zero-points to the sums, channel by channel.
  void unpack_sums() {
    by_rows(values_.rows, [&](auto number) {
      constexpr int R = decltype(number)::value;
      constexpr int kLanes = kWidth / R;
      const int64_t words = v_words_, planes = v_planes_, dim = v_.dim;
      for (int64_t g = 0; g < r_.group; ++g) {
        float* const to = sums(g);
        const float* from = s_.plane_sums + g * s_.plane_stride;
        for (int64_t v = 0; v < values_.vectors; ++v) {
          for (int64_t p = 0; p < planes; ++p, from += 2 * kWidth) {
            float channels[2 * kLanes] = {};  // of the words of one row
            for (int row = 0; row < R; ++row) {
              for (int i = 0; i < kLanes; ++i) {
                channels[2 * i] += from[row * kLanes + i];
                channels[2 * i + 1] += from[kWidth + row * kLanes + i];
              }
            }
            const int64_t word = v * (I::kBytes / 2), first = p * words + word;
            for (int i = 0; i < 2 * kLanes && word + i < words && first + i < dim; ++i) {
              to[first + i] += channels[i];
            }
          }
        }
        const float* const zeros = s_.zeros + g * kWidth;
        for (int64_t group = 0; group < values_.groups; ++group) {
          float zero = 0.0f;
          for (int64_t i = group; i < kWidth; i += values_.groups) zero += zeros[i];
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
