#include "row_softmax.h"

#include <algorithm>

#include "parallel_ranges.h"
#include "row_softmax_kernel.h"

namespace archer_fast {
namespace {

// Below, making a thread costs more than it saves.
constexpr std::int64_t kElementsWorthThreads = std::int64_t{4} << 20;
// Threads take whole cache lines of a column, several side by side.
constexpr std::int64_t kRowsTogether = 64;

const RowSoftmaxKernel& kernel(SimdLevel level) noexcept {
#ifdef ARCHER_X86_KERNELS
  if (level == SimdLevel::kAvx512) return kRowSoftmaxAvx512;
  if (level == SimdLevel::kAvx2) return kRowSoftmaxAvx2;
#endif
  static_cast<void>(level);
  return kRowSoftmaxBaseline;
}

template <class Body>
void for_rows(const LogitTile& tile, int threads, const Body& body) noexcept {
  const std::int64_t groups = (tile.n + kRowsTogether - 1) / kRowsTogether;
  parallel_ranges(groups, tile.n * tile.v < kElementsWorthThreads ? 1 : threads,
                  [&](std::int64_t begin, std::int64_t end) noexcept {
                    body(RowRange{begin * kRowsTogether, std::min(end * kRowsTogether, tile.n)});
                  });
}

}  // namespace

void softmax_update(const LogitTile& tile, const float* logits, std::int64_t column_stride, float* state, int threads,
                    SimdLevel level) noexcept {
  const RowSoftmaxKernel& run = kernel(level);
  for_rows(tile, threads, [&](RowRange rows) noexcept { run.update(tile, logits, column_stride, state, rows); });
}

void softmax_backward(const LogitTile& tile, const float* logits, std::int64_t column_stride,
                      const SoftmaxGradient& gradient, float* out, std::int64_t out_column_stride, int threads,
                      SimdLevel level) noexcept {
  const RowSoftmaxKernel& run = kernel(level);
  for_rows(tile, threads, [&](RowRange rows) noexcept {
    run.backward(tile, logits, column_stride, gradient, out, out_column_stride, rows);
  });
}

}  // namespace archer_fast
