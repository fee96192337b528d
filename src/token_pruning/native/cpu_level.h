// What the processor can do.
#pragma once

namespace tp {

enum Level : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AMX = 3 };

// The best level this processor and operating system allow. The first call asks the system for AMX.
Level best_level();

}  // namespace tp
