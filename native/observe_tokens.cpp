#include "observe_tokens.h"

#include <algorithm>

#include "kernels.h"
#include "top.h"

namespace tamis {
namespace {

// Below this many tokens in all rows waking other threads costs more than they save.
constexpr int64_t kParallelTokens = 1 << 14;

}  // namespace

void softmax_tokens(const SoftmaxArgs& a, Isa isa, int threads) {
  const int64_t rows = a.n * a.q_heads, group = a.q_heads / a.kv_heads;
  SoftmaxRow* const softmax = kernels(isa).softmax_row;
  if (rows * a.width < kParallelTokens) threads = 1;

#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = i / a.q_heads, head = i % a.q_heads / group;
    const int64_t length = a.lengths[row * a.lengths_row_stride + head * a.lengths_head_stride];
    const float factor = a.divisors != nullptr ? 1.0f / a.divisors[i] : 1.0f;
    softmax(a.scores + i * a.width, a.width, a.first, length - a.last, factor);
  }
}

void top_tokens(const TopTokensArgs& a, int threads) {
  if (a.rows * a.width < kParallelTokens) threads = 1;

#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t length = a.lengths[row], there = std::min(a.count, length);
    const int64_t first = std::min(a.first, there), last = std::min(a.last, there - first);
    const int64_t others = there - first - last;
    int64_t* out = a.out + row * a.count;
    for (int64_t i = 0; i < first; ++i) *out++ = i;
    const float* const values = a.values + row * a.row_stride + first;
    top_indices(values, length - first - last, others, out);
    for (int64_t i = 0; i < others; ++i) *out++ += first;
    for (int64_t i = length - last; i < length - last + a.count - first - others; ++i) *out++ = i;
  }
}

}  // namespace tamis
