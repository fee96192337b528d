#include "cpu_level.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace tp {

// A bit per level.
static unsigned detect() {
    unsigned levels = 1u << PORTABLE;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return levels;
    levels |= 1u << AVX2;
    unsigned a, b, c, d, more = 0;
    __get_cpuid_count(7, 1, &more, &b, &c, &d);
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    const bool avx_vnni = more & 1u << 4, bfloat16 = more & 1u << 5;
    if (avx_vnni) levels |= 1u << AVX_VNNI;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return levels;
    levels |= 1u << AVX512;
    if (__builtin_cpu_supports("avx512vnni")) {
        levels |= 1u << AVX512_VNNI;
#if defined(TP_TEST_AVX_VNNI)
        levels |= 1u << AVX_VNNI;
#endif
    }
    if (!bfloat16 || !(levels >> AVX512_VNNI & 1)) return levels;
    levels |= 1u << AVX512_BF16;
    const unsigned amx = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, int8
#if defined(__linux__)
    const int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if ((d & amx) == amx && syscall(SYS_arch_prctl, request_permission, tile_data) == 0) levels |= 1u << AMX;
#endif
#elif defined(__aarch64__)
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2), matrices = 1 << 13, half = 1 << 14;
    levels |= 1u << NEON;  // every one has it
    if (!(first & HWCAP_ASIMDDP)) return levels;
    levels |= 1u << DOTPROD;
    if ((second & matrices) && (second & half)) levels |= 1u << I8MM;  // both are of ARMv8.6
#endif
    return levels;
}

bool has_level(int level) {
    static const unsigned levels = detect();
    return level >= 0 && level < LEVELS && (levels >> level & 1);
}

}  // namespace tp
