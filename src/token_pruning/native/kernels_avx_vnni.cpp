#define TP_LEVEL avx_vnni
#include "kernels_dot.h"

namespace tp {
namespace avx_vnni {

struct Quadruples {
    typedef int8_t Number;
    typedef VecInt Sum;
    static constexpr int group = 4, rows = 6, limit = 127, offset = 128;
    static VecInt add(VecInt sums, VecInt a, VecInt b) {
#if defined(TP_TEST_AVX_VNNI)  // the same instruction as processors with AVX-512 encode it, for tests on these
        asm("%{evex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b));
        return sums;
#else
        return (VecInt)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#endif
    }
};

}  // namespace avx_vnni

const Kernels* avx_vnni_kernels(Dtype dtype) {
    static const Kernels int8 = avx_vnni::dot_table<avx_vnni::Quadruples>("avx_vnni", "int8 products by AVX-VNNI");
    return dtype == Dtype::int8 ? &int8 : nullptr;
}

}  // namespace tp
