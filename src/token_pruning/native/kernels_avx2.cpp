#define TP_LEVEL avx2
#include "kernels_dot.h"

namespace tp {
namespace avx2 {

// Two products of 8-bit numbers make a 16-bit one, which saturates: 2 · 255 · 64 < 2¹⁵ is why a weight has 7 bits.
struct Pairs {
    typedef int8_t Number;
    typedef VecInt Sum;
    static constexpr int group = 4, rows = 4, limit = 64, offset = 128;
    static VecInt add(VecInt sums, VecInt a, VecInt b) {
        const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
        return (VecInt)_mm256_add_epi32((__m256i)sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

}  // namespace avx2

const Kernels* avx2_kernels(Dtype dtype) {
    static const Kernels tables[] = {
        avx2::table_of<float>("avx2", "float32 products"),
        avx2::table_of<uint16_t>("avx2", "bfloat16 weights, products in float32"),
        avx2::dot_table<avx2::Pairs>("avx2", "int8 products: weights of 7 bits, activations of 8"),
    };
    return &tables[(int)dtype];
}

}  // namespace tp
