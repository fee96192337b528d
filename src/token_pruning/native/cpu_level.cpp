#include "cpu_level.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tp {

static Level detect() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PORTABLE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return AVX2;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return AVX512;  // AVX512_BF16
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    const unsigned amx = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, int8
    if ((d & amx) != amx) return AVX512;
#if defined(__linux__)
    const int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, request_permission, tile_data) == 0) return AMX;
#endif
    return AVX512;
#else
    return PORTABLE;
#endif
}

Level best_level() {
    static const Level level = detect();
    return level;
}

}  // namespace tp
