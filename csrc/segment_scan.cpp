#include "segment_scan.h"

#include <algorithm>

#include "parallel_ranges.h"
#include "segment_scan_kernel.h"

namespace archer_fast {
namespace {

// Below, making a thread costs more than it saves: 1M tokens take one thread 0.2 ms.
constexpr std::int64_t kTokensWorthThreads = std::int64_t{1} << 22;

SegmentScanKernel kernel(SimdLevel level) noexcept {
#ifdef ARCHER_X86_KERNELS
  if (level == SimdLevel::kAvx512) return kSegmentScanAvx512;
  if (level == SimdLevel::kAvx2) return kSegmentScanAvx2;
#endif
  static_cast<void>(level);
  return kSegmentScanBaseline;
}

}  // namespace

void segment_scan(const float* a, const float* b, std::span<const std::int32_t> cu, float* out, int threads,
                  SimdLevel level) noexcept {
  const SegmentScanKernel run = kernel(level);
  const std::int64_t num_tokens = cu.back();
  const std::int64_t parts = num_tokens < kTokensWorthThreads ? 1 : std::max(threads, 1);
  // The segment boundary at or after an even share of the tokens.
  const auto cut = [&](std::int64_t part) noexcept {
    return std::lower_bound(cu.begin(), cu.end() - 1, num_tokens * part / parts) - cu.begin();
  };
  parallel_ranges(parts, static_cast<int>(parts), [&](std::int64_t first, std::int64_t last) noexcept {
    const std::int64_t begin = cut(first);
    const std::int64_t end = last == parts ? static_cast<std::int64_t>(cu.size()) - 1 : cut(last);
    run({.a = a, .b = b, .cu = cu.data() + begin, .num_segments = end - begin, .out = out});
  });
}

}  // namespace archer_fast
