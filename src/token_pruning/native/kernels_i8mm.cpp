// Processors that have the int8 matrix instruction have that for bfloat16 too.
#define TP_LEVEL i8mm
#define TP_NEON
#include "kernels_dot.h"

namespace tp {
namespace i8mm {

struct Whole {
    typedef int8_t Number;
    typedef VecInt Sum;
    static constexpr int group = 8, rows = 12, limit = 127, offset = 0;
    static VecInt add(VecInt sums, VecInt a, VecInt b) {
        return (VecInt)vmmlaq_s32((int32x4_t)sums, (int8x16_t)a, (int8x16_t)b);
    }
};

struct Half {
    typedef uint16_t Number;
    typedef Vec Sum;
    static constexpr int group = 4, rows = 12, limit = 0, offset = 0;
    static Vec add(Vec sums, VecInt a, VecInt b) {
        return (Vec)vbfmmlaq_f32((float32x4_t)sums, (bfloat16x8_t)a, (bfloat16x8_t)b);
    }
    static void convert(const float* x, int count, uint16_t* to) {
        int i = 0;
        for (; i + 4 <= count; i += 4) vst1_bf16((bfloat16_t*)(to + i), vcvt_bf16_f32((float32x4_t)load(x + i)));
        for (; i < count; i++) to[i] = to_half(x[i]);
    }
};

}  // namespace i8mm

const Kernels* i8mm_kernels(Dtype dtype) {
    static const Kernels int8 = i8mm::dot_table<i8mm::Whole>("i8mm", "int8 products by SMMLA"),
                         bfloat16 = i8mm::dot_table<i8mm::Half>("i8mm", "bfloat16 products by BFMMLA");
    return dtype == Dtype::int8 ? &int8 : dtype == Dtype::bfloat16 ? &bfloat16 : nullptr;
}

}  // namespace tp
