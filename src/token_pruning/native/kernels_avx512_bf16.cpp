#define TP_LEVEL avx512_bf16
#include "kernels_dot.h"

namespace tp {
namespace avx512_bf16 {

struct Pairs {
    typedef uint16_t Number;
    typedef Vec Sum;
    static constexpr int group = 2, rows = 12, limit = 0, offset = 0;
    static Vec add(Vec sums, VecInt a, VecInt b) {
        return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
    }
    static void convert(const float* x, int count, uint16_t* to) {
        int i = 0;
        for (; i + 16 <= count; i += 16)
            _mm256_storeu_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh((__m512)load(x + i)));
        for (; i < count; i++) to[i] = to_half(x[i]);
    }
};

}  // namespace avx512_bf16

const Kernels* avx512_bf16_kernels(Dtype dtype) {
    static const Kernels bfloat16 =
        avx512_bf16::dot_table<avx512_bf16::Pairs>("avx512_bf16", "bfloat16 products by AVX-512 BF16");
    return dtype == Dtype::bfloat16 ? &bfloat16 : nullptr;
}

}  // namespace tp
