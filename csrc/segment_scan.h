// The linear recurrence backwards in time over the segments of a flat array.
#pragma once

#include <cstddef>
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

// Copies offsets [B+1], at least one, to `out` as 32 bits; whether they rise from 0 to `total`, which is below 2^31.
// What is in `out` says nothing where they do not. Owner: the caller of both. Threads: any.
template <class Offset>
bool copy_offsets(std::span<const Offset> cu, std::int64_t total, std::int32_t* out) noexcept {
  bool rises = cu.front() == 0 && cu.back() == total;
  out[0] = 0;
  for (std::size_t k = 1; k < cu.size(); ++k) {
    rises &= cu[k] >= cu[k - 1];
    out[k] = static_cast<std::int32_t>(cu[k]);
  }
  return rises;
}

}  // namespace archer_fast
