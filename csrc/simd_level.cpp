#include "simd_level.h"

#include <stdexcept>

#include "concat.h"

namespace archer_fast {

const char* simd_name(SimdLevel level) noexcept {
  switch (level) {
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kAvx2:
      return "avx2";
    case SimdLevel::kBaseline:
      break;
  }
  return "baseline";
}

std::vector<SimdLevel> simd_levels() {
  std::vector<SimdLevel> levels;
#ifdef ARCHER_X86_KERNELS
  // These ask the operating system too: registers it does not save are not reported.
  const bool fma = __builtin_cpu_supports("fma") != 0;
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    levels.push_back(SimdLevel::kAvx512);
  }
  if (fma && __builtin_cpu_supports("avx2")) levels.push_back(SimdLevel::kAvx2);
#endif
  levels.push_back(SimdLevel::kBaseline);
  return levels;
}

SimdLevel simd_level(std::string_view name) {
  const std::vector<SimdLevel> levels = simd_levels();
  if (name == "auto") return levels.front();
  std::string known = "auto";
  for (const SimdLevel level : levels) {
    if (name == simd_name(level)) return level;
    known += concat(", ", simd_name(level));
  }
  throw std::invalid_argument(concat("simd: wanted one of ", known, " on this machine, got '", name, "'"));
}

}  // namespace archer_fast
