#include "system/cpu.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <stdexcept>

namespace ktlib {
namespace {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(uint32_t value, int index) { return (value >> index) & 1u; }

// XCR0: the register state that the operating system saves.
uint64_t os_state() {
  if (!bit(cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// Linux enables the tile registers per process, on request (Documentation/arch/x86/xstate.rst).
bool request_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The features that `needed` lists as (present, name) and this CPU or system lacks.
std::string lacking(std::initializer_list<std::pair<bool, const char*>> needed) {
  std::string text;
  for (const auto& [present, name] : needed)
    if (!present) text += (text.empty() ? "needs " : ", ") + std::string(name);
  return text;
}

std::vector<Isa> detect() {
  const Registers leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
  const uint64_t os = os_state();
  const std::string avx2 = lacking({{bit(leaf7.ebx, 5), "AVX2"},
                                    {bit(cpuid(1, 0).ecx, 12), "FMA"},
                                    {(os & 6) == 6, "operating system support for AVX registers"}});
  const bool os_avx512 = (os & 0xe6) == 0xe6;
  const std::string avx512 = lacking({{bit(leaf7.ebx, 16), "AVX512F"},
                                      {bit(cpuid(1, 0).ecx, 12), "FMA"},
                                      {bit(leaf7.ebx, 17), "AVX512DQ"},
                                      {bit(leaf7.ebx, 30), "AVX512BW"},
                                      {bit(leaf7.ebx, 31), "AVX512VL"},
                                      {os_avx512, "operating system support for AVX-512 registers"}});
  const std::string avx512_bf16 =
      !avx512.empty() ? avx512 : lacking({{bit(leaf7_1.eax, 5), "AVX512_BF16"}});
  std::string amx = !avx512_bf16.empty() ? avx512_bf16
                                         : lacking({{bit(leaf7.edx, 24), "AMX-TILE"}, {bit(leaf7.edx, 22), "AMX-BF16"}});
  if (amx.empty() && !request_tiles()) amx = "has AMX, but the operating system does not permit its tile registers";
  return {
      {"amx_bf16", kernels_amx, amx},
      {"avx512_bf16", kernels_avx512_bf16, avx512_bf16},
      {"avx512f", kernels_avx512f, avx512},
      {"avx2", kernels_avx2, avx2},
      {"portable", kernels_portable, ""},
      {"amx_emulated", kernels_amx_emulated, ""},
  };
}

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = detect();
  return list;
}

const Kernels& select_isa(const std::string& name) {
  std::string known;
  for (const Isa& isa : isas()) {
    if (name == isa.name && !isa.missing.empty())
      throw std::runtime_error("isa: '" + name + "' cannot run on this machine: it " + isa.missing);
    if (name == isa.name || (name.empty() && isa.missing.empty())) return isa.table();
    known += (known.empty() ? "'" : ", '") + std::string(isa.name) + "'";
  }
  throw std::invalid_argument("isa: got '" + name + "', known are " + known);
}

}  // namespace ktlib
