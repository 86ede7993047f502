#include "rotate.h"

#include "kernels.h"
#include "threads.h"

namespace tamis {
namespace {

// Below this many elements waking other threads costs more than they save.
constexpr int64_t kParallelElements = 1 << 15;

}  // namespace

void rotate_keys(const RotateArgs& a, Isa isa, int threads) {
  if (a.rows * a.dim < kParallelElements) threads = 1;
  RotateKey* const rotate = kernels(isa).rotate_key[static_cast<int>(a.dtype)];
#pragma omp parallel num_threads(threads)
  share(a.rows, 1, thread_index(), team_size(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) rotate(a, row);
  });
}

}  // namespace tamis
