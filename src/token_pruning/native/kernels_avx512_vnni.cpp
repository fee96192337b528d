#define TP_LEVEL avx512_vnni
#include "kernels_dot.h"

namespace tp {
namespace avx512_vnni {

struct Quadruples {
    typedef int8_t Number;
    typedef VecInt Sum;
    static constexpr int group = 4, rows = 12, limit = 127, offset = 128;
    static VecInt add(VecInt sums, VecInt a, VecInt b) {
        return (VecInt)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
    }
};

}  // namespace avx512_vnni

const Kernels* avx512_vnni_kernels(Dtype dtype) {
    static const Kernels int8 =
        avx512_vnni::dot_table<avx512_vnni::Quadruples>("avx512_vnni", "int8 products by AVX-512 VNNI");
    return dtype == Dtype::int8 ? &int8 : nullptr;
}

}  // namespace tp
