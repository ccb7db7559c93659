// Row functions of a softmax over the vocabulary: online statistics forward, gradient of the logits backward.
#pragma once

#include <cstdint>

#include "simd_level.h"

namespace archer_fast {

// Logits of n rows and v columns of the vocabulary, float32: that of row i in column j is data[j * column_stride + i].
// A column is contiguous, so that a register holds one column of many rows and no sum runs across its lanes.
//
//   z[i, j] = cap(logit[i, j]) * inv_temperature[i],   cap(x) = softcap * tanh(x / softcap); x where softcap is 0
//
// Owner: the caller of all memory; nothing is kept and nothing is allocated but threads. Threads: any; up to `threads`
// share the rows where that pays, each row is one thread's, so the bits do not depend on `threads`.
struct LogitTile {
  std::int64_t n = 0;
  std::int64_t v = 0;
  std::int64_t first_column = 0;             // of the tile, in the vocabulary
  const std::int64_t* target_ids = nullptr;  // [n], columns of the vocabulary
  const float* inv_temperature = nullptr;    // [n], above 0
  float softcap = 0;
};

// The columns of the tile join the running statistics of each row:
//
//   state [n, 4] = m, the maximum of z; s = sum exp(z - m); t = sum exp(z - m) (z - m); z at the target
//
// A row starts as (-inf, 0, 0, nan); the fourth is written by the call whose columns hold target_ids[i].
// A masked column (z = -inf) adds 0, also before any other was seen. NaN makes its row's s and t NaN.
// After the last call lse = m + log s, log p(target) = (z_target - m) - log s, entropy = log s - t / s.
void softmax_update(const LogitTile& tile, const float* logits, std::int64_t column_stride, float* state, int threads,
                    SimdLevel level) noexcept;

// What is known of each of n rows before its gradient. Owner: the caller.
struct SoftmaxGradient {
  const float* row_max = nullptr;        // [n], of z over the whole vocabulary
  const float* log_sum = nullptr;        // [n], log sum exp(z - row_max)
  const float* entropy = nullptr;        // [n], of softmax(z)
  const float* grad_logprobs = nullptr;  // [n]
  const float* grad_entropy = nullptr;   // [n], or null for zeros
  const float* grad_lse = nullptr;       // [n], or null for zeros
};

// The gradient that reaches the logits of a tile, into `out`, laid out as they are; it may be `logits` with the same
// stride, and overlaps them in no other way. With l = (z - row_max) - log_sum, because z - lse would lose digits where
// the logits are large, and p = exp(l):
//
//   dz = p ((g_lse - g_logprob) - g_entropy (l + entropy)) + g_logprob [column is the target]
//   dx = dz * inv_temperature * (1 - tanh(x / softcap)^2)
//
// A row whose three gradients are 0 becomes 0 whatever it holds.
void softmax_backward(const LogitTile& tile, const float* logits, std::int64_t column_stride,
                      const SoftmaxGradient& gradient, float* out, std::int64_t out_column_stride, int threads,
                      SimdLevel level) noexcept;

}  // namespace archer_fast
