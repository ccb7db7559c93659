// The inner loops of row_softmax, one row a call, once for each instruction set.
#pragma once

#include <cstdint>

namespace archer_fast {

// All that a row needs; the contract of each number is in row_softmax.h.
struct UpdateRow {
  const float* logits;  // [v]
  std::int64_t v;
  std::int64_t target;  // column of this tile; outside [0, v) where another tile has it
  float inv_temperature;
  float softcap;
  float* state;  // [4]
};

struct BackwardRow {
  float* logits;  // [v]
  std::int64_t v;
  std::int64_t target;  // in [0, v)
  float inv_temperature;
  float softcap;
  float row_max;
  float log_sum;
  float entropy;
  float grad_logprob;
  float grad_entropy;
  float grad_lse;
};

struct RowSoftmaxKernel {
  void (*update)(const UpdateRow& row) noexcept;
  void (*backward)(const BackwardRow& row) noexcept;
};

// Pure functions of their argument; any thread. Precondition: the machine has the instruction set.
extern const RowSoftmaxKernel kRowSoftmaxBaseline;
extern const RowSoftmaxKernel kRowSoftmaxAvx2;    // x86-64 only
extern const RowSoftmaxKernel kRowSoftmaxAvx512;  // x86-64 only

}  // namespace archer_fast
