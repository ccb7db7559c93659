// Which instruction sets the row kernels exist for, and which of them this machine runs.
#pragma once

#include <string_view>
#include <vector>

namespace archer_fast {

enum class SimdLevel { kBaseline, kAvx2, kAvx512 };

// "avx512" (f, dq, fma), "avx2" (with fma), "baseline" (what every machine of this architecture has).
const char* simd_name(SimdLevel level) noexcept;

// Those this machine can run, best first; "baseline" is always the last. Any thread.
std::vector<SimdLevel> simd_levels();

// The level of that name, the best one for "auto". Throws std::invalid_argument where the name is
// unknown or this machine cannot run it. Any thread.
SimdLevel simd_level(std::string_view name);

}  // namespace archer_fast
