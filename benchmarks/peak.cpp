// What one core can do at most: peak KIND…: GOP/s of products of these kinds, and GB/s read from memory, as JSON.
// A product and its sum are two operations.
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
#include <string>

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

// Twelve sums, so that none waits for the last product; registers 12 to 15 are factors.
#define TWELVE(WITH) WITH(0) WITH(1) WITH(2) WITH(3) WITH(4) WITH(5) WITH(6) WITH(7) WITH(8) WITH(9) WITH(10) WITH(11)
#define ZMM(INSTRUCTION, SUM) INSTRUCTION " %%zmm15, %%zmm14, %%zmm" #SUM "\n"
#define YMM(INSTRUCTION, SUM) INSTRUCTION " %%ymm15, %%ymm14, %%ymm" #SUM "\n"
#define AVX512(SUM) ZMM("vfmadd231ps", SUM)
#define AVX512_BF16(SUM) ZMM("vdpbf16ps", SUM)
#define AVX512_VNNI(SUM) ZMM("vpdpbusd", SUM)
#define AVX_VNNI(SUM) YMM("%{vex%} vpdpbusd", SUM)
#define AVX2(SUM) YMM("vfmadd231ps", SUM)
#define AVX2_INT8(SUM)                                                            \
    "vpmaddubsw %%ymm15, %%ymm14, %%ymm13\n vpmaddwd %%ymm12, %%ymm13, %%ymm13\n" \
    "vpaddd %%ymm13, %%ymm" #SUM ", %%ymm" #SUM "\n"
#define PRODUCTS(KIND, PAIRS)                                                                                   \
    {#KIND, PAIRS, [](int rounds) {                                                                             \
         for (int i = 0; i < rounds; i++)                                                                       \
             asm volatile(TWELVE(KIND)::                                                                        \
                              : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                                "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                          \
     }}

static const struct {
    const char* kind;
    int pairs;  // that one instruction multiplies, or three for int8 with AVX2
    void (*run)(int rounds);
} products[] = {PRODUCTS(AVX512, 16),   PRODUCTS(AVX512_BF16, 32), PRODUCTS(AVX512_VNNI, 64),
                PRODUCTS(AVX_VNNI, 32), PRODUCTS(AVX2, 8),         PRODUCTS(AVX2_INT8, 32)};

static double reading() {
    const size_t bytes = (size_t)170 << 20;
    char* memory = (char*)std::aligned_alloc(2 << 20, bytes);
    madvise(memory, bytes, MADV_HUGEPAGE);
    std::memset(memory, 1, bytes);
    volatile int sink = 0;
    const double seconds = fastest([&] {
        __m256i all = _mm256_setzero_si256();
        for (size_t i = 0; i + 4096 < bytes; i += 64) {
            _mm_prefetch(memory + i + 2048, _MM_HINT_T1);
            for (int half : {0, 32})
                all = _mm256_xor_si256(all, _mm256_load_si256((const __m256i*)(memory + i + half)));
        }
        sink = _mm256_extract_epi32(all, 0);
    });
    std::free(memory);
    return bytes / seconds / 1e9;
}

int main(int count, char** kinds) {
    std::printf("{");
    for (int i = 1; i < count; i++) {
        const std::string kind = kinds[i];
        double rate = kind == "AMX_BF16" ? amx(false) : kind == "AMX_INT8" ? amx(true) : 0;
        for (const auto& each : products)
            if (kind == each.kind) rate = 12.0 * each.pairs * 2 * 1e-3 / fastest([&] { each.run(1000000); });
        std::printf("\"%s\": %.0f, ", kinds[i], rate);
    }
    std::printf("\"reading\": %.1f}\n", reading());
}
