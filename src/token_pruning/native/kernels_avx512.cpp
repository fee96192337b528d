#define TP_LEVEL avx512
#include "kernels_dot.h"

namespace tp {
namespace avx512 {

// As kernels_avx2.cpp has it.
struct Pairs {
    typedef int8_t Number;
    typedef VecInt Sum;
    static constexpr int group = 4, rows = 12, limit = 64, offset = 128;
    static VecInt add(VecInt sums, VecInt a, VecInt b) {
        const __m512i pairs = _mm512_maddubs_epi16((__m512i)a, (__m512i)b);
        return (VecInt)_mm512_add_epi32((__m512i)sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    }
};

}  // namespace avx512

const Kernels* avx512_kernels(Dtype dtype) {
    static const Kernels tables[] = {
        avx512::table_of<float>("avx512", "float32 products"),
        avx512::table_of<uint16_t>("avx512", "bfloat16 weights, products in float32"),
        avx512::dot_table<avx512::Pairs>("avx512", "int8 products: weights of 7 bits, activations of 8"),
    };
    return &tables[(int)dtype];
}

}  // namespace tp
