// Scratch memory of the threads of a team.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "threads.h"

namespace tamis {

// Floats for each thread, from the start of a cache line: rows of tiles that straddle two lines are
// loaded at half the speed.
class Scratch {
  static constexpr std::align_val_t kLine{64};
  static constexpr int64_t kLineFloats = 16;

  struct Delete {
    void operator()(float* memory) const { ::operator delete[](memory, kLine); }
  };
  const int64_t floats_;  // of one thread, whole lines
  const std::unique_ptr<float[], Delete> memory_;

 public:
  Scratch(int threads, int64_t floats)
      : floats_((floats + kLineFloats - 1) / kLineFloats * kLineFloats),
        memory_(new (kLine) float[threads * floats_]) {}

  // The calling thread's.
  float* mine() const { return memory_.get() + thread_index() * floats_; }
};

}  // namespace tamis
