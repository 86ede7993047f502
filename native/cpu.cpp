#include "cpu.h"

#include <cstdint>

#ifdef TAMIS_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
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

// Whether the system lets this process use tiles, whose 8 KiB it saves only for those that asked.
bool tiles_are_permitted() {
#ifdef __linux__
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

CpuFeatures detected() {
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
  found.amx = tiles && found.avx512_bf16 && found.avx512_vnni && has(extended.edx, 22) &&
              has(extended.edx, 24) && tiles_are_permitted();
  return found;
}

}  // namespace
#else
static CpuFeatures detected() { return {}; }
#endif

CpuFeatures cpu_features() {
  // Asked once: under a hypervisor cpuid takes microseconds.
  static const CpuFeatures found = detected();
  return found;
}

bool runs(Isa isa) {
  const CpuFeatures found = cpu_features();
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return found.avx2;
    case Isa::avx512:
      return found.avx512;
    case Isa::avx512_bf16:
      return found.avx512_bf16 && found.avx512_vnni;
    case Isa::amx:
      return found.amx;
    case Isa::amx_emulated:
#ifdef TAMIS_EMULATE_AMX
      return found.avx512_bf16 && found.avx512_vnni;
#else
      return false;
#endif
  }
  return false;
}

Isa best_isa() {
  constexpr Isa from_the_best[] = {Isa::amx, Isa::avx512_bf16, Isa::avx512, Isa::avx2};
  for (const Isa isa : from_the_best) {
    if (runs(isa)) return isa;
  }
  return Isa::portable;
}

}  // namespace tamis
