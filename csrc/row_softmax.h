// Row functions of a softmax over the vocabulary: online statistics forward, gradient of the logits backward.
#pragma once

#include <cstdint>

#include "simd_level.h"

namespace archer_fast {

// Logits [n, v] float32: row i begins at data + i * row_stride.
//
//   z[i, j] = cap(data[i, j]) * inv_temperature[i],   cap(x) = softcap * tanh(x / softcap); x where softcap is 0
struct LogitRows {
  std::int64_t row_stride = 0;  // in elements
  std::int64_t n = 0;
  std::int64_t v = 0;
  const float* inv_temperature = nullptr;  // [n], above 0
  float softcap = 0;
};

// The columns [first_column, first_column + v) of the vocabulary join the running statistics of each row:
//
//   state [n, 4] = m, the maximum of z; s = sum exp(z - m); t = sum exp(z - m) (z - m); z at the target
//
// A row starts as (-inf, 0, 0, nan); the fourth is written by the call whose columns hold target_ids[i].
// A masked column (z = -inf) adds 0, also before any other was seen. NaN makes its row's s and t NaN.
// After the last call lse = m + log s, log p(target) = (z_target - m) - log s, entropy = log s - t / s.
//
// Owner: the caller of all memory; nothing is kept and nothing is allocated but threads. `logits` is
// only read. Threads: any; up to `threads` share the rows where that pays, each row is one thread's, so
// the bits do not depend on `threads`.
void softmax_update(const LogitRows& rows, const float* logits, std::int64_t first_column,
                    const std::int64_t* target_ids, float* state, int threads, SimdLevel level) noexcept;

// What is known of each of n rows before its gradient. Owner: the caller.
struct SoftmaxGradient {
  const std::int64_t* target_ids = nullptr;  // [n], in [0, v)
  const float* row_max = nullptr;            // [n], of z
  const float* log_sum = nullptr;            // [n], log sum exp(z - row_max)
  const float* entropy = nullptr;            // [n], of softmax(z)
  const float* grad_logprobs = nullptr;      // [n]
  const float* grad_entropy = nullptr;       // [n], or null for zeros
  const float* grad_lse = nullptr;           // [n], or null for zeros
};

// Overwrites the logits of the whole vocabulary with the gradient that reaches them. With l = (z - row_max) -
// log_sum, because z - lse would lose digits where the logits are large, and p = exp(l):
//
//   dz = p ((g_lse - g_logprob) - g_entropy (l + entropy)) + g_logprob [j == target]
//   dx = dz * inv_temperature * (1 - tanh(x / softcap)^2)
//
// A row whose three gradients are 0 becomes 0 whatever it holds. Owner, threads: as above.
void softmax_backward(const LogitRows& rows, float* logits, const SoftmaxGradient& gradient, int threads,
                      SimdLevel level) noexcept;

}  // namespace archer_fast
