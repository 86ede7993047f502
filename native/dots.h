// Inner products of a few queries with many keys, lanes along the dimension.
#pragma once

#include <cstdint>

#include "decode.h"
#include "vector_math.h"

namespace tamis {

// Bring one row into the cache.
template <class T>
void prefetch_row(const T* row, int64_t dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < dim * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(bytes + i, 0, 3);
}

// Rows that are read later, brought into the cache line by line at the pace of those at work: asked
// for at once, they would find no room among the loads that are under way.
template <class T>
class RowsAhead {
  const T* const* rows_ = nullptr;
  int64_t row_bytes_ = 0, left_ = 0;
  uintptr_t at_ = 0, end_ = UINTPTR_MAX, step_ = 0;  // in the row at hand; step 0 stays for good

  void enter(const T* row) {
    at_ = reinterpret_cast<uintptr_t>(row);
    end_ = at_ + row_bytes_;
  }

 public:
  RowsAhead() : at_(reinterpret_cast<uintptr_t>(this)) {}
  RowsAhead(const T* const* rows, int64_t count, int64_t dim) : RowsAhead() {
    if (count <= 0) return;
    rows_ = rows, row_bytes_ = dim * int64_t{sizeof(T)}, left_ = count, step_ = 64;
    enter(*rows);
  }

  // Ask for the next line; the last one again when there is none.
  void ask() {
    __builtin_prefetch(reinterpret_cast<const void*>(at_), 0, 3);
    at_ += step_;
    if (at_ < end_) return;
    if (--left_ > 0) {
      enter(*++rows_);
    } else {
      at_ = reinterpret_cast<uintptr_t>(*rows_), end_ = UINTPTR_MAX, step_ = 0;
    }
  }
};

// Queries q [count, dim] as the inner product takes them, each padded with zeros.
template <class Isa, class T>
void pack_dot_queries(const T* q, int64_t stride, int64_t count, int64_t dim,
                      typename Isa::template Dot<T>::Query* to) {
  using Dot = typename Isa::template Dot<T>;
  const int64_t pad = padded(dim);
  for (int64_t g = 0; g < count; ++g) {
    for (int64_t d = 0; d < pad; ++d) {
      to[g * pad + d] = d < dim ? Dot::query(q[g * stride + d]) : typename Dot::Query{};
    }
  }
}

// products[n, t] of N queries with `count` keys, of the queries' type or another that Dot loads: a
// vector's width of (query, key) pairs at once. `keys` and the rows of `products` are readable and
// writable to a whole number of vectors; `beside(element)` is called with every vector of a key, so
// that other memory can be asked for at the pace at which keys are read.
template <class Isa, class T, int N, class Key, class Beside>
void dot_products(const typename Isa::template Dot<T>::Query* queries, int64_t query_stride,
                  const Key* const* keys, int64_t count, int64_t dim, float* products,
                  int64_t product_stride, Beside beside) {
  using Vec = typename Isa::Vec;
  using Dot = typename Isa::template Dot<T>;
  constexpr int kWidth = Isa::kWidth;
  constexpr int kTokens = kWidth / N;
  for (int64_t t = 0; t < count; t += kTokens) {
    Vec pairs[kWidth];
    for (int i = 0; i < kWidth; ++i) pairs[i] = Isa::set(0.0f);
    const auto multiply = [&](int64_t d, auto load) {
      typename Dot::Lanes rows[kTokens];
      for (int j = 0; j < kTokens; ++j) {
        beside(keys[t + j] + d);
        rows[j] = load(keys[t + j] + d);
      }
      for (int i = 0; i < N; ++i) {
        const auto query = Dot::load(queries + i * query_stride + d);
        for (int j = 0; j < kTokens; ++j) {
          pairs[i * kTokens + j] = Dot::multiply_add(pairs[i * kTokens + j], query, rows[j]);
        }
      }
    };
    int64_t d = 0;
    for (; d + Dot::kStep <= dim; d += Dot::kStep) {
      multiply(d, [](const Key* key) { return Dot::load(key); });
    }
    if (const int64_t left = dim - d) {
      multiply(d, [left](const Key* key) { return Dot::load(key, left); });
    }
    float sums[kWidth];
    Isa::store(sums, Isa::sums(pairs));
    for (int i = 0; i < N; ++i) {
      float* const to = products + i * product_stride + t;
      for (int j = 0; j < kTokens; ++j) to[j] = sums[i * kTokens + j];
    }
  }
}

template <class Isa, class T, int N, class Key>
void dot_products(const typename Isa::template Dot<T>::Query* queries, int64_t query_stride,
                  const Key* const* keys, int64_t count, int64_t dim, float* products,
                  int64_t product_stride) {
  dot_products<Isa, T, N>(queries, query_stride, keys, count, dim, products, product_stride,
                          [](const Key*) {});
}

}  // namespace tamis
