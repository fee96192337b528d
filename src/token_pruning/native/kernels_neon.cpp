#define TP_LEVEL neon
#define TP_NEON
#include "kernels_dot.h"

namespace tp {
namespace neon {

// Sums of two products fit 16 bits: 2 · 127 · 127 < 2¹⁵.
struct Pairs {
    typedef int8_t Number;
    typedef VecInt Sum;
    static constexpr int group = 4, rows = 6, limit = 127, offset = 0;
    static VecInt add(VecInt sums, VecInt a, VecInt b) {
        const int8x16_t x = (int8x16_t)a, y = (int8x16_t)b;
        const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)), vmull_high_s8(x, y));
        return (VecInt)vpadalq_s16((int32x4_t)sums, pairs);
    }
    template <int LANE>
    static VecInt add_lane(VecInt sums, VecInt a, VecInt b) {
        return add(sums, (VecInt)vdupq_laneq_s32((int32x4_t)a, LANE), b);
    }
};

}  // namespace neon

const Kernels* neon_kernels(Dtype dtype) {
    static const Kernels tables[] = {
        neon::table_of<float>("neon", "float32 products"),
        neon::table_of<uint16_t>("neon", "bfloat16 weights, products in float32"),
        neon::dot_table<neon::Pairs>("neon", "int8 products"),
    };
    return &tables[(int)dtype];
}

}  // namespace tp
