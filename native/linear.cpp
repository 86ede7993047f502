// Threads own contiguous runs of outputs, so the result is the same for any number of them.

#include "linear.h"

#include "kernels.h"
#include "scratch.h"

namespace tamis {
namespace {

// Below this many bytes of weights waking other threads costs more than they save.
constexpr int64_t kParallelBytes = 1 << 16;

}  // namespace

LinearRange* linear_range_of(const Kernels& kernels, const LinearArgs& args) {
  const auto& ranges = args.scales != nullptr ? kernels.linear_int8_range : kernels.linear_range;
  return ranges[static_cast<int>(args.dtype)];
}

void linear(const LinearArgs& a, Isa isa, int threads) {
  const int64_t size = a.scales != nullptr ? 1 : size_of(a.dtype);
  if (a.out * a.in * size < kParallelBytes) threads = 1;
  const Scratch scratch(threads, linear_scratch_floats(a.rows, a.in));
  LinearRange* const range = linear_range_of(kernels(isa), a);

#pragma omp parallel num_threads(threads)
  share(a.out, kOutputs, thread_index(), team_size(),
        [&](int64_t begin, int64_t end) { range(a, begin, end, scratch.mine()); });
}

}  // namespace tamis
