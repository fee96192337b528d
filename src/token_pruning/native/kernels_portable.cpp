#define TP_LEVEL portable
#include "kernels_vector.h"

namespace tp {
const Kernels* portable_kernels(Dtype dtype) { return portable::kernels("portable", dtype); }
}  // namespace tp
