#define TP_LEVEL avx512_vnni
#include "kernels_dot.h"

namespace tp {
const Kernels* avx512_vnni_kernels(Dtype dtype) {
    static const Kernels int8 =
        avx512_vnni::dot_table<avx512_vnni::WideQuadruples>("avx512_vnni", "int8 products by AVX-512 VNNI");
    return dtype == Dtype::int8 ? &int8 : nullptr;
}

}  // namespace tp
