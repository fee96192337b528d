// What one core can do at most: products on AMX tiles and in AVX-512 registers, and reading memory.
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
template <class Function>
static double fastest(Function function) {
    double best = 1e9;
    for (int turn = 0; turn < 9; turn++) {
        const double began = now();
        function();
        best = std::min(best, now() - began);
    }
    return best;
}

struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static double amx(bool int8) {
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return 0;
    static const TileConfiguration configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
    const int rounds = 50000;
    const double seconds = fastest([&] {
        for (int i = 0; i < rounds; i++) {
            if (int8)
                asm volatile(
                    "tdpbssd %%tmm6, %%tmm4, %%tmm0\n tdpbssd %%tmm7, %%tmm4, %%tmm1\n"
                    "tdpbssd %%tmm6, %%tmm5, %%tmm2\n tdpbssd %%tmm7, %%tmm5, %%tmm3" ::);
            else
                asm volatile(
                    "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n"
                    "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::);
        }
    });
    asm volatile("tilerelease");
    return rounds * 4.0 * 16 * 16 * (int8 ? 64 : 32) * 2 / seconds / 1e9;
}

static double avx512() {
    __m512 sums[24];
    for (__m512& s : sums) s = _mm512_setzero_ps();
    const __m512 factor = _mm512_set1_ps(0.5f);
    const int rounds = 1000000;
    const double seconds = fastest([&] {
        for (int i = 0; i < rounds; i++) {
#pragma GCC unroll 24
            for (int j = 0; j < 24; j++) sums[j] = _mm512_fmadd_ps(sums[j], factor, factor);
            asm volatile("" ::"x"(sums[0]));
        }
    });
    float total = 0;
    for (__m512 s : sums) total += _mm512_reduce_add_ps(s);
    if (total == 0) std::puts("");
    return rounds * 24.0 * 32 / seconds / 1e9;
}

static double reading() {
    const size_t bytes = (size_t)170 << 20;
    char* memory = (char*)std::aligned_alloc(2 << 20, bytes);
    madvise(memory, bytes, MADV_HUGEPAGE);
    std::memset(memory, 1, bytes);
    volatile int sink = 0;
    const double seconds = fastest([&] {
        __m512i all = _mm512_setzero_si512();
        for (size_t i = 0; i + 4096 < bytes; i += 256)
            for (int line = 0; line < 4; line++) {
                _mm_prefetch(memory + i + 2048 + 64 * line, _MM_HINT_T1);
                all = _mm512_xor_si512(all, _mm512_load_si512(memory + i + 64 * line));
            }
        sink = _mm512_reduce_add_epi32(all);
    });
    std::free(memory);
    return bytes / seconds / 1e9;
}

int main() {
    std::printf("{\"bfloat16\": %.0f, \"int8\": %.0f, \"float32\": %.0f, \"reading\": %.1f}\n", amx(false), amx(true),
                avx512(), reading());
}
