// The inner loops of row_softmax over a range of rows, once for each instruction set.
#pragma once

#include <cstdint>

#include "row_softmax.h"

namespace archer_fast {

// Rows [begin, end) of a tile; the contract of each argument is in row_softmax.h.
struct RowRange {
  std::int64_t begin;
  std::int64_t end;
};

struct RowSoftmaxKernel {
  void (*update)(const LogitTile& tile, const float* logits, std::int64_t column_stride, float* state,
                 RowRange rows) noexcept;
  void (*backward)(const LogitTile& tile, const float* logits, std::int64_t column_stride,
                   const SoftmaxGradient& gradient, float* out, std::int64_t out_column_stride, RowRange rows) noexcept;
};

// Pure functions of their arguments; any thread. Precondition: the machine has the instruction set.
extern const RowSoftmaxKernel kRowSoftmaxBaseline;
extern const RowSoftmaxKernel kRowSoftmaxAvx2;    // x86-64 only
extern const RowSoftmaxKernel kRowSoftmaxAvx512;  // x86-64 only

}  // namespace archer_fast
