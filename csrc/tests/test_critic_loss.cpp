#include "critic_loss.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

using archer_fast::CriticLoss;
using archer_fast::CriticLossKind;

namespace {

struct Result {
  explicit Result(std::size_t n) : grads(4 * n, NAN) {}
  std::vector<float> losses = std::vector<float>(4, NAN);
  std::vector<float> stats = std::vector<float>(16, NAN);
  std::vector<float> grads;
};

Result run(const CriticLoss& loss, const std::vector<float>& values, const std::vector<float>& targets) {
  Result result(values.size() / 4);
  archer_fast::critic_loss(loss, values.data(), targets.data(), static_cast<std::int64_t>(values.size() / 4),
                           result.losses.data(), result.stats.data(), result.grads.data());
  return result;
}

}  // namespace

TEST_CASE("each kind by hand") {
  const std::vector<float> values = {1, 2, 1, 2, 1, 2, 1, 2};
  const std::vector<float> targets = {3, 1, 3, 1, 3, 1, 3, 1};  // u = 2, -1
  const Result mse = run({CriticLossKind::kMse}, values, targets);
  CHECK(mse.losses == std::vector<float>(4, 2.5F));
  CHECK(mse.grads == std::vector<float>{-2, 1, -2, 1, -2, 1, -2, 1});
  CHECK(std::vector(mse.stats.begin(), mse.stats.begin() + 4) == std::vector<float>{1.5F, 1, 2, 0.5F});

  const Result expectile = run({CriticLossKind::kExpectile, 0.75}, values, targets);
  CHECK(expectile.losses == std::vector<float>{2.5F, 2.5F, 1.625F, 1.625F});
  CHECK(expectile.grads == std::vector<float>{-2, 1, -2, 1, -1.5F, 0.25F, -1.5F, 0.25F});

  const Result huber = run({CriticLossKind::kHuber, 0.5, 1}, values, targets);
  CHECK(huber.losses == std::vector<float>(4, 1));
  CHECK(huber.grads == std::vector<float>{-0.5F, 0.5F, -0.5F, 0.5F, -0.5F, 0.5F, -0.5F, 0.5F});
}

TEST_CASE("a spread of a hundredth round ten thousand, over many blocks") {
  std::mt19937 random(3);
  std::normal_distribution<double> normal(1e4, 1e-2);
  std::vector<float> values(4 * 5001);
  for (float& value : values) value = static_cast<float>(normal(random));
  const Result got = run({}, values, values);
  for (std::size_t row = 0; row < 4; ++row) {
    const auto begin = values.begin() + static_cast<std::ptrdiff_t>(row * 5001);
    double mean = 0, squares = 0;
    for (auto value = begin; value != begin + 5001; ++value) mean += static_cast<double>(*value) / 5001;
    for (auto value = begin; value != begin + 5001; ++value) squares += std::pow(static_cast<double>(*value) - mean, 2);
    CHECK(got.losses[row] == 0);
    CHECK(got.stats[4 * row] == static_cast<float>(mean));
    CHECK(got.stats[4 * row + 1] == *std::min_element(begin, begin + 5001));
    CHECK(got.stats[4 * row + 2] == *std::max_element(begin, begin + 5001));
    CHECK(std::abs(got.stats[4 * row + 3] - static_cast<float>(std::sqrt(squares / 5001))) < 1e-9F);
  }
}

TEST_CASE("no elements, one element") {
  const Result none = run({}, {}, {});
  CHECK(none.losses == std::vector<float>(4, 0));
  CHECK(std::all_of(none.stats.begin(), none.stats.end(), [](float x) { return std::isnan(x); }));
  const Result one = run({}, {1, 2, 3, 4}, {1, 2, 3, 5});
  CHECK(one.losses == std::vector<float>{0, 0, 0, 1});
  CHECK(std::vector(one.stats.begin() + 12, one.stats.end()) == std::vector<float>{4, 4, 4, 0});
}

TEST_CASE("NaN is seen in its own row, in every number of it") {
  for (const auto kind : {CriticLossKind::kMse, CriticLossKind::kExpectile, CriticLossKind::kHuber}) {
    std::vector<float> values(4 * 2000, 1);
    values[2 * 2000 + 1500] = NAN;
    const Result got = run({kind}, values, std::vector<float>(4 * 2000, 2));
    for (std::size_t row = 0; row < 4; ++row) {
      CHECK(std::isnan(got.losses[row]) == (row == 2));
      for (std::size_t i = 0; i < 4; ++i) CHECK(std::isnan(got.stats[4 * row + i]) == (row == 2));
    }
    CHECK(std::isnan(got.grads[2 * 2000 + 1500]));
    CHECK(std::isfinite(got.grads[2 * 2000 + 1501]));
  }
}

TEST_CASE("an unknown kind is refused") {
  CHECK(archer_fast::critic_loss_kind("expectile") == CriticLossKind::kExpectile);
  CHECK_THROWS_WITH_AS(archer_fast::critic_loss_kind("l1"), "kind: wanted mse, expectile or huber, got 'l1'",
                       std::invalid_argument);
}
