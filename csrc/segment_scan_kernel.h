// The inner loop of segment_scan over one range of whole segments, once for each instruction set.
#pragma once

#include <cstdint>

namespace archer_fast {

struct SegmentRange {
  const float* a;          // [T]
  const float* b;          // [T]
  const std::int32_t* cu;  // [num_segments + 1] of this range, nondecreasing
  std::int64_t num_segments;
  float* out;  // [T]; written in [cu[0], cu[num_segments])
};

// Pure functions of their argument; any thread. Precondition: the machine has the instruction set.
using SegmentScanKernel = void (*)(const SegmentRange& range) noexcept;
extern const SegmentScanKernel kSegmentScanBaseline;
extern const SegmentScanKernel kSegmentScanAvx2;    // x86-64 only
extern const SegmentScanKernel kSegmentScanAvx512;  // x86-64 only

}  // namespace archer_fast
