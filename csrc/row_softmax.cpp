#include "row_softmax.h"

#include "parallel_ranges.h"
#include "row_softmax_kernel.h"

namespace archer_fast {
namespace {

// Below, making a thread costs more than it saves.
constexpr std::int64_t kElementsWorthThreads = std::int64_t{4} << 20;

const RowSoftmaxKernel& kernel(SimdLevel level) noexcept {
#ifdef ARCHER_X86_KERNELS
  if (level == SimdLevel::kAvx512) return kRowSoftmaxAvx512;
  if (level == SimdLevel::kAvx2) return kRowSoftmaxAvx2;
#endif
  static_cast<void>(level);
  return kRowSoftmaxBaseline;
}

template <class Body>
void for_rows(const LogitRows& rows, int threads, const Body& body) noexcept {
  const auto range = [&](std::int64_t begin, std::int64_t end) noexcept {
    for (std::int64_t i = begin; i < end; ++i) body(i);
  };
  parallel_ranges(rows.n, rows.n * rows.v < kElementsWorthThreads ? 1 : threads, range);
}

}  // namespace

void softmax_update(const LogitRows& rows, const float* logits, std::int64_t first_column,
                    const std::int64_t* target_ids, float* state, int threads, SimdLevel level) noexcept {
  const RowSoftmaxKernel& run = kernel(level);
  for_rows(rows, threads, [&](std::int64_t i) noexcept {
    run.update({.logits = logits + i * rows.row_stride,
                .v = rows.v,
                .target = target_ids[i] - first_column,
                .inv_temperature = rows.inv_temperature[i],
                .softcap = rows.softcap,
                .state = state + 4 * i});
  });
}

void softmax_backward(const LogitRows& rows, float* logits, const SoftmaxGradient& gradient, int threads,
                      SimdLevel level) noexcept {
  const RowSoftmaxKernel& run = kernel(level);
  for_rows(rows, threads, [&](std::int64_t i) noexcept {
    run.backward({.logits = logits + i * rows.row_stride,
                  .v = rows.v,
                  .target = gradient.target_ids[i],
                  .inv_temperature = rows.inv_temperature[i],
                  .softcap = rows.softcap,
                  .row_max = gradient.row_max[i],
                  .log_sum = gradient.log_sum[i],
                  .entropy = gradient.entropy[i],
                  .grad_logprob = gradient.grad_logprobs[i],
                  .grad_entropy = gradient.grad_entropy == nullptr ? 0 : gradient.grad_entropy[i],
                  .grad_lse = gradient.grad_lse == nullptr ? 0 : gradient.grad_lse[i]});
  });
}

}  // namespace archer_fast
