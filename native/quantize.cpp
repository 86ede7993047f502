// Threads own whole groups, so the result is the same for any number of them.

#include "quantize.h"

#include <algorithm>

#include "kernels.h"
#include "scratch.h"

namespace tamis {
namespace {

// Below this many elements waking other threads costs more than they save.
constexpr int64_t kParallelElements = 1 << 14;

}  // namespace

void quantize(const QuantizeArgs& a, Isa isa, int threads) {
  if (a.tokens * a.dim < kParallelElements) threads = 1;
  const int64_t zeros = quantize_scratch_floats(a.dim, a.bits);
  const Scratch scratch(threads, zeros);
  QuantizeRange* const range = kernels(isa).quantize_range[static_cast<int>(a.dtype)];

#pragma omp parallel num_threads(threads)
  share(a.tokens, a.along_tokens ? a.group : 1, thread_index(), team_size(),
        [&](int64_t begin, int64_t end) {
          std::fill_n(scratch.mine(), zeros, 0.0f);
          range(a, begin, end, scratch.mine());
        });
}

}  // namespace tamis
