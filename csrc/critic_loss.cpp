#include "critic_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "concat.h"

namespace archer_fast {
namespace {

constexpr std::int64_t kBlock = 1024;  // values read twice, the second time from the first cache

// Mean and sum of squared deviations of the values seen so far (Chan, Golub and LeVeque 1983).
struct Moments {
  double count = 0;
  double mean = 0;
  double squares = 0;

  void join(const Moments& other) noexcept {
    const double total = count + other.count;
    const double delta = other.mean - mean;
    mean += delta * (other.count / total);
    squares += other.squares + delta * delta * (count * other.count / total);
    count = total;
  }
};

Moments moments_of(const float* values, std::int64_t n) noexcept {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(values[i]);
  Moments moments{.count = static_cast<double>(n), .mean = sum / static_cast<double>(n)};
  for (std::int64_t i = 0; i < n; ++i) {
    const double deviation = static_cast<double>(values[i]) - moments.mean;
    moments.squares += deviation * deviation;
  }
  return moments;
}

// An element's loss, and its derivative with respect to u.
struct Term {
  double value;
  double slope;
};

Term squared(double u, double weight) noexcept { return {weight * u * u, 2 * weight * u}; }

Term huber(double u, double delta) noexcept {
  if (std::abs(u) <= delta) return {0.5 * u * u, u};
  const double slope = u > delta ? delta : u < -delta ? -delta : u;  // the last: NaN
  return {delta * (std::abs(u) - 0.5 * delta), slope};
}

// Writes the row's loss, statistics [4] and gradients [n].
template <class Function>
void one_row(const Function& term, const float* values, const float* targets, std::int64_t n, float& loss, float* stats,
             float* grads) noexcept {
  const double scale = -1.0 / static_cast<double>(n);  // u falls as the value rises
  double sum = 0;
  Moments moments;
  float least = values[0];
  float most = values[0];
  bool has_nan = false;
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const std::int64_t count = std::min(kBlock, n - first);
    for (std::int64_t i = first; i < first + count; ++i) {
      const Term t = term(static_cast<double>(targets[i]) - static_cast<double>(values[i]));
      sum += t.value;
      grads[i] = static_cast<float>(scale * t.slope);
      least = std::min(least, values[i]);
      most = std::max(most, values[i]);
      has_nan |= std::isnan(values[i]);
    }
    moments.join(moments_of(values + first, count));
  }
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  loss = static_cast<float>(sum / static_cast<double>(n));
  stats[0] = static_cast<float>(moments.mean);
  stats[1] = has_nan ? kNan : least;
  stats[2] = has_nan ? kNan : most;
  stats[3] = static_cast<float>(std::sqrt(moments.squares / moments.count));
}

}  // namespace

CriticLossKind critic_loss_kind(std::string_view name) {
  if (name == "mse") return CriticLossKind::kMse;
  if (name == "expectile") return CriticLossKind::kExpectile;
  if (name == "huber") return CriticLossKind::kHuber;
  throw std::invalid_argument(concat("kind: wanted mse, expectile or huber, got '", name, "'"));
}

void critic_loss(const CriticLoss& loss, const float* values, const float* targets, std::int64_t n, float* losses,
                 float* stats, float* grads) noexcept {
  if (n == 0) {
    std::fill_n(losses, 4, 0.0F);
    std::fill_n(stats, 16, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  for (int row = 0; row < 4; ++row) {
    const auto run = [&](const auto& term) {
      one_row(term, values + row * n, targets + row * n, n, losses[row], stats + 4 * row, grads + row * n);
    };
    const bool is_v = row >= 2;
    if (loss.kind == CriticLossKind::kHuber) {
      run([&](double u) { return huber(u, loss.huber_delta); });
    } else if (loss.kind == CriticLossKind::kExpectile && is_v) {
      run([&](double u) { return squared(u, u < 0 ? 1 - loss.expectile : loss.expectile); });
    } else {
      run([](double u) { return squared(u, 1); });
    }
  }
}

}  // namespace archer_fast
