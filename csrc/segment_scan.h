// The linear recurrence backwards in time over the segments of a flat array.
#pragma once

#include <cstdint>
#include <span>

#include "simd_level.h"

namespace archer_fast {

// y_t = b_t + a_t y_{t+1} inside each segment [cu[k], cu[k + 1]); y is 0 past a segment's end, so y = b at its last
// token, whose `a` is never read into a result. What is infinite or NaN in one segment stays in it.
//
// a, b, out [T]; cu [B + 1] = 0 ... T nondecreasing, B >= 0; segments may be empty. `out` overlaps neither.
//
// Owner: the caller of all memory; nothing is kept and nothing is allocated but threads. Threads: any; up to `threads`
// share the segments, by tokens, where that pays. A segment is one thread's, but its place in the array decides how
// its sums are associated: the last bits may depend on `threads` and `level`.
void segment_scan(const float* a, const float* b, std::span<const std::int32_t> cu, float* out, int threads,
                  SimdLevel level) noexcept;

}  // namespace archer_fast
