#define TP_LEVEL avx2
#include "kernels_vector.h"

namespace tp {
const Kernels* avx2_kernels(Dtype dtype) { return avx2::kernels("avx2", dtype); }
}  // namespace tp
