// The losses of a double critic's four heads, their gradients, and what the heads' values look like.
#pragma once

#include <cstdint>
#include <string_view>

namespace archer_fast {

enum class CriticLossKind { kMse, kExpectile, kHuber };

// "mse", "expectile" or "huber"; throws std::invalid_argument for another name.
CriticLossKind critic_loss_kind(std::string_view name);

// u = target - value; a head's loss is the mean over its n elements of
//
//   mse        u^2
//   expectile  |expectile - [u < 0]| u^2 for v1 and v2, u^2 for q1 and q2
//   huber      0.5 u^2 where |u| <= huber_delta, else huber_delta (|u| - 0.5 huber_delta)
struct CriticLoss {
  CriticLossKind kind = CriticLossKind::kMse;
  double expectile = 0.5;
  double huber_delta = 1;
};

// values, targets [4, n], rows q1, q2, v1, v2. Written: losses [4] (0 where n = 0), stats [4, 4] with each row's mean,
// minimum, maximum and standard deviation of the population (NaN where n = 0, or where a value is), and grads [4, n] =
// d losses[row] / d values[row, i].
//
// Sums are double and the deviation is taken from the mean, so a small spread round a large mean keeps its digits.
// Owner: the caller of all memory; nothing is kept or allocated. Threads: any.
void critic_loss(const CriticLoss& loss, const float* values, const float* targets, std::int64_t n, float* losses,
                 float* stats, float* grads) noexcept;

}  // namespace archer_fast
