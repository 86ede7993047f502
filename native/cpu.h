// What the processor can do.
#pragma once

namespace tamis {

struct CpuFeatures {
  bool avx2;         // with FMA and F16C
  bool avx512;       // F, BW, DQ and VL
  bool avx512_bf16;
  bool avx512_vnni;
  bool amx;          // tiles of bf16
};

// Instruction sets with their own kernels, from the least to the most demanding.
enum class Isa { portable, avx2, avx512, avx512_bf16 };

// Features that both the processor and the operating system support.
CpuFeatures cpu_features();

// The most demanding instruction set that this machine runs.
Isa best_isa();

}  // namespace tamis
