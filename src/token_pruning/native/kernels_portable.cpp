#define TP_LEVEL portable
#include "kernels_dot.h"

namespace tp {
namespace portable {

// Four products after another, in whatever vectors the compiler has; SSE2, where it is, multiplies 16-bit numbers.
struct Words {
    typedef int8_t Number;
    typedef VecInt Sum;
    static constexpr int group = 4, rows = 4, limit = 127, offset = 0;
    static VecInt add(VecInt sums, VecInt a, VecInt b) {
#if defined(__SSE2__)
        const __m128i x = (__m128i)a, y = (__m128i)b;
        const __m128i even =
            _mm_madd_epi16(_mm_srai_epi16(_mm_slli_epi16(x, 8), 8), _mm_srai_epi16(_mm_slli_epi16(y, 8), 8));
        const __m128i odd = _mm_madd_epi16(_mm_srai_epi16(x, 8), _mm_srai_epi16(y, 8));
        return (VecInt)_mm_add_epi32((__m128i)sums, _mm_add_epi32(even, odd));
#else
        for (int up = 24; up >= 0; up -= 8)
            sums += ((VecInt)((VecWord)a << up) >> 24) * ((VecInt)((VecWord)b << up) >> 24);
        return sums;
#endif
    }
};

}  // namespace portable

const Kernels* portable_kernels(Dtype dtype) {
    static const Kernels tables[] = {
        portable::table_of<float>("portable", "float32 products"),
        portable::table_of<uint16_t>("portable", "bfloat16 weights, products in float32"),
        portable::dot_table<portable::Words>("portable", "int8 products"),
    };
    return &tables[(int)dtype];
}

}  // namespace tp
