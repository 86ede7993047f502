#include "cpu.h"

#include <cstdint>

#ifdef TAMIS_X86
#include <cpuid.h>
#endif

namespace tamis {

#ifdef TAMIS_X86
namespace {

struct Registers {
  unsigned eax, ebx, ecx, edx;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r{};
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// Which register files the operating system saves on a context switch (XCR0).
uint64_t saved_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool has(unsigned bits, int bit) { return bits >> bit & 1u; }

}  // namespace

CpuFeatures cpu_features() {
  CpuFeatures found{};
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  constexpr int osxsave = 27;
  if (!has(basic.ecx, osxsave)) return found;
  const uint64_t saved = saved_state();
  const bool ymm = (saved & 0x6) == 0x6;
  const bool zmm = ymm && (saved & 0xe0) == 0xe0;
  const bool tiles = (saved & 0x60000) == 0x60000;
  found.avx2 = ymm && has(extended.ebx, 5) && has(basic.ecx, 12) && has(basic.ecx, 29);
  found.avx512 = zmm && found.avx2 && has(extended.ebx, 16) && has(extended.ebx, 17) &&
                 has(extended.ebx, 30) && has(extended.ebx, 31);
  found.avx512_bf16 = found.avx512 && has(more.eax, 5);
  found.avx512_vnni = found.avx512 && has(extended.ecx, 11);
  found.amx = tiles && has(extended.edx, 22) && has(extended.edx, 24);
  return found;
}
#else
CpuFeatures cpu_features() { return {}; }
#endif

Isa best_isa() {
  // Asked once: under a hypervisor cpuid takes microseconds.
  static const Isa best = [] {
    const CpuFeatures found = cpu_features();
    if (found.avx512_bf16 && found.avx512_vnni) return Isa::avx512_bf16;
    if (found.avx512) return Isa::avx512;
    return found.avx2 ? Isa::avx2 : Isa::portable;
  }();
  return best;
}

}  // namespace tamis
