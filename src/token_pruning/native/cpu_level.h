// What the processor can do.
#pragma once

namespace tp {

// Best last. A processor may have a level and lack one below it: AVX-VNNI is for those without AVX-512. The last three
// are those of ARM.
enum Level : int { PORTABLE, AVX2, AVX_VNNI, AVX512, AVX512_VNNI, AVX512_BF16, AMX, NEON, DOTPROD, I8MM, LEVELS };

// Whether this processor and operating system have a level. The first call asks the system for AMX.
bool has_level(int level);

}  // namespace tp
