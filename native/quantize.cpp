// Threads own whole groups, so the result is the same for any number of them.

#include "quantize.h"

#include <memory>

#include "kernels.h"
#include "threads.h"

namespace tamis {
namespace {

// Below this many elements waking other threads costs more than they save.
constexpr int64_t kParallelElements = 1 << 14;

}  // namespace

void quantize(const QuantizeArgs& a, Isa isa, int threads) {
  if (a.tokens * a.dim < kParallelElements) threads = 1;
  const int64_t scratch_size = quantize_scratch_floats(a.dim, a.bits);
  const std::unique_ptr<float[]> scratch(new float[threads * scratch_size]());
  QuantizeRange* const range = kernels(isa).quantize_range[static_cast<int>(a.dtype)];

#pragma omp parallel num_threads(threads)
  share(a.tokens, a.along_tokens ? a.group : 1, thread_index(), team_size(),
        [&](int64_t begin, int64_t end) {
          range(a, begin, end, scratch.get() + thread_index() * scratch_size);
        });
}

}  // namespace tamis
