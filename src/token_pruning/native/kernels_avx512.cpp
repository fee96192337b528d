#define TP_LEVEL avx512
#include "kernels_vector.h"

namespace tp {
const Kernels* avx512_kernels(Dtype dtype) { return avx512::kernels("avx512", dtype); }
}  // namespace tp
