#include "row_softmax.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

using archer_fast::LogitTile;
using archer_fast::simd_levels;
using archer_fast::SimdLevel;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// v columns of n logits and all that the row functions ask for, in memory whose columns are 3 floats apart.
struct Problem {
  Problem(std::int64_t n, std::int64_t v, float spread, float mean = 0) : n(n), v(v), stride(n + 3) {
    std::mt19937 random(static_cast<unsigned>(n * 1000 + v));
    std::normal_distribution<float> normal(mean, spread);
    std::uniform_real_distribution<float> uniform(-1, 1);
    logits.resize(static_cast<std::size_t>(v * stride), kNan);
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < v; ++j) at(i, j) = normal(random);
      target_ids.push_back(static_cast<std::int64_t>(random() % static_cast<unsigned>(v)));
      inv_temperature.push_back(1 + 0.25F * uniform(random));
      grad_logprobs.push_back(uniform(random));
      grad_entropy.push_back(uniform(random));
      grad_lse.push_back(uniform(random));
    }
  }

  float& at(std::int64_t i, std::int64_t j) { return logits[static_cast<std::size_t>(j * stride + i)]; }
  LogitTile tile(std::int64_t first, std::int64_t columns) const {
    return {n, columns, first, target_ids.data(), inv_temperature.data(), softcap};
  }

  // z as the kernels define it, with the float32 rounding of nothing but the inputs.
  double z(std::int64_t i, std::int64_t j) {
    const auto x = static_cast<double>(at(i, j));
    const auto cap = static_cast<double>(softcap);
    return (cap == 0 ? x : cap * std::tanh(x / cap)) *
           static_cast<double>(inv_temperature[static_cast<std::size_t>(i)]);
  }

  std::int64_t n, v, stride;
  float softcap = 0;
  std::vector<float> logits;
  std::vector<std::int64_t> target_ids;
  std::vector<float> inv_temperature, grad_logprobs, grad_entropy, grad_lse;
};

using State = std::array<float, 4>;

std::vector<State> update(Problem& p, SimdLevel level, std::int64_t tile, int threads = 1) {
  std::vector<State> state(static_cast<std::size_t>(p.n), State{-kInfinity, 0, 0, kNan});
  for (std::int64_t first = 0; first < p.v; first += tile) {
    archer_fast::softmax_update(p.tile(first, std::min(tile, p.v - first)), p.logits.data() + first * p.stride,
                                p.stride, state.front().data(), threads, level);
  }
  return state;
}

struct Truth {
  double lse = 0;
  double entropy = 0;
  double at_target = 0;
};

Truth truth(Problem& p, std::int64_t i) {
  double m = -std::numeric_limits<double>::infinity();
  for (std::int64_t j = 0; j < p.v; ++j) m = std::max(m, p.z(i, j));
  double s = 0, t = 0;
  for (std::int64_t j = 0; j < p.v; ++j) {
    const double d = p.z(i, j) - m;
    s += std::exp(d);
    if (std::isfinite(d)) t += std::exp(d) * d;
  }
  return {m + std::log(s), std::log(s) - t / s, p.z(i, p.target_ids[static_cast<std::size_t>(i)])};
}

void check_close(float got, double wanted, double tolerance) {
  CHECK(std::abs(static_cast<double>(got) - wanted) <= tolerance);
}

// |z| rounded to float32 is off by up to 4e-6 at 64 and 1.6e-5 at 256: no kernel can be nearer than that.
void check_state(Problem& p, const std::vector<State>& state, double tolerance) {
  for (std::int64_t i = 0; i < p.n; ++i) {
    const auto& [m, s, t, at_target] = state[static_cast<std::size_t>(i)];
    const Truth exact = truth(p, i);
    check_close(m + std::log(s), exact.lse, tolerance);
    check_close(std::log(s) - t / s, exact.entropy, tolerance);
    check_close(at_target, exact.at_target, tolerance);
    CHECK((at_target - m) - std::log(s) <= 0);
  }
}

// p with its logits replaced by the gradient, a tile of columns at a time: in place, or by way of other memory.
Problem backward(Problem p, const std::vector<State>& state, SimdLevel level, std::int64_t tile = 0, int threads = 1,
                 bool is_in_place = true) {
  std::vector<float> row_max, log_sum, entropy;
  for (const auto& [m, s, t, at_target] : state) {
    row_max.push_back(m);
    log_sum.push_back(std::log(s));
    entropy.push_back(std::log(s) - t / s);
  }
  const archer_fast::SoftmaxGradient gradient{.row_max = row_max.data(),
                                              .log_sum = log_sum.data(),
                                              .entropy = entropy.data(),
                                              .grad_logprobs = p.grad_logprobs.data(),
                                              .grad_entropy = p.grad_entropy.empty() ? nullptr : p.grad_entropy.data(),
                                              .grad_lse = p.grad_lse.empty() ? nullptr : p.grad_lse.data()};
  if (tile == 0) tile = p.v;
  for (std::int64_t first = 0; first < p.v; first += tile) {
    const std::int64_t columns = std::min(tile, p.v - first);
    float* logits = p.logits.data() + first * p.stride;
    if (is_in_place) {
      archer_fast::softmax_backward(p.tile(first, columns), logits, p.stride, gradient, logits, p.stride, threads,
                                    level);
      continue;
    }
    std::vector<float> out(static_cast<std::size_t>(columns * (p.n + 1)), kNan);
    archer_fast::softmax_backward(p.tile(first, columns), logits, p.stride, gradient, out.data(), p.n + 1, threads,
                                  level);
    for (std::int64_t j = 0; j < columns; ++j) {
      std::copy_n(out.data() + j * (p.n + 1), p.n, logits + j * p.stride);
      CHECK(std::isnan(out[static_cast<std::size_t>(j * (p.n + 1) + p.n)]));
    }
  }
  return p;
}

void check_gradient(Problem& p, Problem& got, double tolerance) {
  for (std::int64_t i = 0; i < p.n; ++i) {
    const auto row = static_cast<std::size_t>(i);
    const Truth exact = truth(p, i);
    const auto g = static_cast<double>(p.grad_logprobs[row]);
    const double g_entropy = p.grad_entropy.empty() ? 0 : static_cast<double>(p.grad_entropy[row]);
    const double g_lse = p.grad_lse.empty() ? 0 : static_cast<double>(p.grad_lse[row]);
    for (std::int64_t j = 0; j < p.v; ++j) {
      const double log_p = p.z(i, j) - exact.lse;
      double dz = std::isfinite(log_p) ? std::exp(log_p) * (g_lse - g - g_entropy * (log_p + exact.entropy)) : 0;
      if (j == p.target_ids[row]) dz += g;
      const auto cap = static_cast<double>(p.softcap);
      const double cosh = cap == 0 ? 1 : std::cosh(static_cast<double>(p.at(i, j)) / cap);
      check_close(got.at(i, j), dz * static_cast<double>(p.inv_temperature[row]) / (cosh * cosh), tolerance);
    }
  }
  for (std::int64_t i = p.n; i < p.stride; ++i) {
    for (std::int64_t j = 0; j < p.v; ++j) CHECK(std::isnan(got.at(i, j)));  // not our memory
  }
}

std::int64_t units_apart(float x, float y) {
  std::int32_t bits[2];
  std::memcpy(&bits[0], &x, sizeof x);
  std::memcpy(&bits[1], &y, sizeof y);
  return std::abs(static_cast<std::int64_t>(bits[0]) - bits[1]);
}

constexpr std::int64_t kRows[] = {1, 3, 4, 7, 8, 15, 16, 17, 64, 69, 135};
constexpr std::int64_t kColumns[] = {1, 15, 16, 17, 64, 65, 1003};

}  // namespace

TEST_CASE("update and backward equal the formulas in double") {
  for (const SimdLevel level : simd_levels()) {
    for (const std::int64_t n : kRows) {
      for (const std::int64_t v : kColumns) {
        if (n > 17 && v > 65) continue;  // nothing new, and long
        for (const float softcap : {0.0F, 3.0F}) {
          for (const std::int64_t tile : {v, std::max<std::int64_t>(1, v / 3)}) {
            CAPTURE(archer_fast::simd_name(level));
            CAPTURE(n);
            CAPTURE(v);
            CAPTURE(tile);
            Problem p(n, v, 4);
            p.softcap = softcap;
            const auto state = update(p, level, tile);
            check_state(p, state, 4e-6);
            for (const bool all : {true, false}) {
              if (!all) p.grad_entropy.clear(), p.grad_lse.clear();
              for (const bool is_in_place : {true, false}) {
                Problem got = backward(p, state, level, tile, 1, is_in_place);
                check_gradient(p, got, 2e-6);
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("the sums of a quarter of a million columns keep seven digits") {
  for (const SimdLevel level : simd_levels()) {
    Problem p(1, 256'000, 0.5F);
    p.inv_temperature[0] = 1;
    double s = 0, t = 0;
    const auto [m, sum, weighted, at_target] = update(p, level, 8192)[0];
    for (std::int64_t j = 0; j < p.v; ++j) {
      const double d = static_cast<double>(p.at(0, j)) - static_cast<double>(m);
      s += std::exp(d);
      t += std::exp(d) * d;
    }
    check_close(sum, s, 2e-7 * s);
    check_close(weighted, t, 2e-7 * -t);
  }
}

TEST_CASE("peaked rows, rows near -256, rows that are sure of their target") {
  for (const SimdLevel level : simd_levels()) {
    Problem near(3, 1003, 1, -256);
    const auto state = update(near, level, 100);
    check_state(near, state, 6e-5);
    Problem near_got = backward(near, state, level);
    check_gradient(near, near_got, 1e-5);

    Problem peaked(3, 1003, 100);
    const auto peaked_state = update(peaked, level, 100);
    check_state(peaked, peaked_state, 6e-5);
    Problem peaked_got = backward(peaked, peaked_state, level);
    check_gradient(peaked, peaked_got, 2e-5);

    Problem sure(1, 1003, 1);
    sure.inv_temperature[0] = 0.7F;
    sure.target_ids[0] = 1002;
    sure.at(0, 1002) = 1000.3F;
    const auto [m, s, t, at_target] = update(sure, level, 1003)[0];
    CHECK(s == 1);
    CHECK(t == 0);
    CHECK(at_target == m);
    Problem sure_got = backward(sure, {{m, s, t, at_target}}, level);
    CHECK(sure_got.at(0, 1002) == doctest::Approx(sure.grad_lse[0] * 0.7F));
    CHECK(sure_got.at(0, 0) == 0);
  }
}

TEST_CASE("masked columns count for nothing, also a whole first tile of them") {
  for (const SimdLevel level : simd_levels()) {
    Problem p(2, 1003, 2);
    for (std::int64_t j = 0; j < 200; ++j) p.at(0, j) = -kInfinity;
    for (std::int64_t j = 0; j < 1003; j += 2) p.at(1, j) = -kInfinity;
    p.target_ids = {500, 501};
    const auto state = update(p, level, 100);
    check_state(p, state, 4e-6);
    Problem got = backward(p, state, level);
    check_gradient(p, got, 2e-6);
    CHECK(got.at(0, 0) == 0);

    Problem nothing(1, 40, 2);
    std::fill(nothing.logits.begin(), nothing.logits.end(), -kInfinity);
    const auto [m, s, t, at_target] = update(nothing, level, 17)[0];
    CHECK(m == -kInfinity);
    CHECK(s == 0);
    CHECK(t == 0);
    CHECK(at_target == -kInfinity);
  }
}

TEST_CASE("NaN spoils its own row, wherever it lies") {
  for (const SimdLevel level : simd_levels()) {
    for (const std::int64_t column : {0, 40, 992, 1002}) {
      for (const bool masked : {false, true}) {
        Problem p(3, 1003, 2);
        for (std::int64_t j = 0; masked && j < p.v; ++j) p.at(1, j) = -kInfinity;
        p.at(1, column) = kNan;
        const auto state = update(p, level, 300);
        CHECK(std::isnan(state[1][1]));
        CHECK(std::isnan(state[1][2]));
        Problem clean(3, 1003, 2);
        const auto wanted = update(clean, level, 300);
        CHECK(state[0] == wanted[0]);
        CHECK(state[2] == wanted[2]);
        Problem got = backward(p, state, level);
        CHECK(std::isnan(got.at(1, 7)));
        CHECK(std::isfinite(got.at(0, 7)));
        CHECK(std::isfinite(got.at(2, 7)));
      }
    }
  }
}

TEST_CASE("a row without upstream gradients becomes 0") {
  for (const SimdLevel level : simd_levels()) {
    Problem p(2, 1003, 2);
    p.grad_logprobs[0] = p.grad_entropy[0] = p.grad_lse[0] = 0;
    Problem got = backward(p, update(p, level, 1003), level);
    for (std::int64_t j = 0; j < p.v; ++j) CHECK(got.at(0, j) == 0);
    CHECK(got.at(1, 0) != 0);
  }
}

TEST_CASE("exp is right to 2 units in the last place from 0 to where it is flushed") {
  for (const SimdLevel level : simd_levels()) {
    Problem p(1, 100'003, 1);
    for (std::int64_t j = 0; j < p.v; ++j) p.at(0, j) = -87.3F * static_cast<float>(j) / static_cast<float>(p.v - 1);
    const Problem x = p;
    const float one = 1, none = 0;
    p.inv_temperature[0] = 1;
    archer_fast::softmax_backward(p.tile(0, p.v), p.logits.data(), p.stride,
                                  {&none, &none, &none, &none, nullptr, &one}, p.logits.data(), p.stride, 1, level);
    std::int64_t worst = 0;
    for (std::int64_t j = 0; j < p.v; ++j) {
      const auto exact =
          static_cast<float>(std::exp(static_cast<double>(x.logits[static_cast<std::size_t>(j * x.stride)])));
      worst = std::max(worst, units_apart(p.at(0, j), exact));
    }
    CHECK(worst <= 2);
  }
}

TEST_CASE("tanh of the cap keeps its digits near 0 and far from it") {
  for (const SimdLevel level : simd_levels()) {
    for (float x = 1e-20F; x < 1e4F; x *= 1.37F) {
      for (const float sign : {1.0F, -1.0F}) {
        Problem p(1, 1, 1);
        p.softcap = 30;
        p.inv_temperature[0] = 1;
        p.at(0, 0) = sign * x;
        const double exact = 30 * std::tanh(static_cast<double>(sign * x) / 30);
        check_close(update(p, level, 1)[0][3], exact, 5e-7 * std::abs(exact));
      }
    }
  }
}

TEST_CASE("the bits do not depend on the number of threads") {
  for (const SimdLevel level : simd_levels()) {
    Problem p(267, 20'001, 2);  // large enough for threads to be made
    const auto state = update(p, level, 20'001, 1);
    const Problem got = backward(p, state, level, 0, 1);
    for (const int threads : {2, 3, 4}) {
      CHECK(update(p, level, 20'001, threads) == state);
      const Problem other = backward(p, state, level, 0, threads);
      CHECK(std::memcmp(other.logits.data(), got.logits.data(), got.logits.size() * sizeof(float)) == 0);
    }
  }
}

TEST_CASE("no rows") {
  for (const SimdLevel level : simd_levels()) {
    archer_fast::softmax_update({.v = 5}, nullptr, 0, nullptr, 2, level);
    archer_fast::softmax_backward({.v = 5}, nullptr, 0, {}, nullptr, 0, 2, level);
  }
}
