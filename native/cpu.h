// What the processor can do.
#pragma once

namespace tamis {

struct CpuFeatures {
  bool avx2;         // with FMA and F16C
  bool avx512;       // F, BW, DQ and VL
  bool avx512_bf16;
  bool avx512_vnni;
  bool amx;          // tiles of bf16, which this process may use, beside AVX512-BF16 and VNNI
};

// Instruction sets with their own kernels, from the least to the most demanding; and AMX whose
// tiles are emulated on AVX512-BF16, so that tests run all of the kernels but for the tile
// instructions themselves. Only builds for tests have it (TAMIS_EMULATE_AMX).
enum class Isa { portable, avx2, avx512, avx512_bf16, amx, amx_emulated };
constexpr const char* kIsaNames[] = {"portable",    "avx2", "avx512",
                                     "avx512_bf16", "amx",  "amx_emulated"};
constexpr int kIsas = sizeof kIsaNames / sizeof kIsaNames[0];

// Features that both the processor and the operating system support. The first call asks the
// system to let this process use AMX.
CpuFeatures cpu_features();

// Whether this build has kernels of `isa` and this machine runs them.
bool runs(Isa isa);

// The most demanding instruction set that this machine runs, never an emulated one.
Isa best_isa();

}  // namespace tamis
