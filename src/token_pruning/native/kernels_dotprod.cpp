#define TP_LEVEL dotprod
#define TP_NEON
#include "kernels_dot.h"

namespace tp {
namespace dotprod {

struct Quadruples {
    typedef int8_t Number;
    typedef VecInt Sum;
    static constexpr int group = 4, rows = 8, limit = 127, offset = 0;
    static VecInt add(VecInt sums, VecInt a, VecInt b) {
        return (VecInt)vdotq_s32((int32x4_t)sums, (int8x16_t)b, (int8x16_t)a);
    }
    template <int LANE>
    static VecInt add_lane(VecInt sums, VecInt a, VecInt b) {
        return (VecInt)vdotq_laneq_s32((int32x4_t)sums, (int8x16_t)b, (int8x16_t)a, LANE);
    }
};

}  // namespace dotprod

const Kernels* dotprod_kernels(Dtype dtype) {
    static const Kernels int8 = dotprod::dot_table<dotprod::Quadruples>("dotprod", "int8 products by SDOT");
    return dtype == Dtype::int8 ? &int8 : nullptr;
}

}  // namespace tp
