#include "segment_scan.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <span>
#include <vector>

using archer_fast::simd_levels;
using archer_fast::SimdLevel;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Problem {
  explicit Problem(const std::vector<std::int32_t>& lengths) {
    for (const std::int32_t length : lengths) cu.push_back(cu.back() + length);
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform(-0.3F, 1.0F);
    for (std::int32_t t = 0; t < cu.back(); ++t) {
      a.push_back(uniform(random));
      b.push_back(normal(random));
    }
  }

  std::vector<float> scan(SimdLevel level, int threads = 1) const {
    std::vector<float> y(a.size(), kNan);
    archer_fast::segment_scan(a.data(), b.data(), cu, y.data(), threads, level);
    return y;
  }

  std::vector<double> truth() const {
    std::vector<double> y(a.size());
    for (std::size_t k = 0; k + 1 < cu.size(); ++k) {
      double next = 0;
      for (auto t = static_cast<std::size_t>(cu[k + 1]); t-- > static_cast<std::size_t>(cu[k]);) {
        const bool is_last = t + 1 == static_cast<std::size_t>(cu[k + 1]);
        next = static_cast<double>(b[t]) + (is_last ? 0 : static_cast<double>(a[t]) * next);
        y[t] = next;
      }
    }
    return y;
  }

  std::vector<std::int32_t> cu{0};
  std::vector<float> a, b;
};

void check_close(const std::vector<float>& y, const std::vector<double>& wanted) {
  std::size_t num_wrong = 0;
  for (std::size_t t = 0; t < y.size(); ++t) {
    const double error = std::abs(static_cast<double>(y[t]) - wanted[t]) / (1 + std::abs(wanted[t]));
    if (!(error <= 2e-6)) ++num_wrong;  // NaN too
  }
  CHECK(num_wrong == 0);
}

}  // namespace

TEST_CASE("segments of any length equal the recurrence in double") {
  const std::vector<std::vector<std::int32_t>> cases = {
      {},
      {0},
      {0, 0},
      {1},
      {2},
      {0, 1, 0, 2, 0, 100'000, 3, 0},
      {63, 64, 65, 127, 1, 1, 1},
      {2047, 2, 4097},
      {20, 0, 0, 1'000'000, 7},
  };
  for (const SimdLevel level : simd_levels()) {
    for (const auto& lengths : cases) {
      const Problem p(lengths);
      for (const int threads : {1, 2, 3}) check_close(p.scan(level, threads), p.truth());
    }
    const Problem many(std::vector<std::int32_t>(50'000, 13));
    for (const int threads : {1, 2, 4}) check_close(many.scan(level, threads), many.truth());
  }
}

TEST_CASE("enough tokens for threads to be made") {
  std::vector<std::int32_t> lengths(100'000, 21);
  lengths.insert(lengths.begin() + 50'000, 2'500'000);
  const Problem p(lengths);
  const auto truth = p.truth();
  for (const SimdLevel level : simd_levels()) {
    for (const int threads : {2, 3}) check_close(p.scan(level, threads), truth);
  }
}

TEST_CASE("sums that do not fade") {
  for (const SimdLevel level : simd_levels()) {
    Problem p({5000, 5000});
    for (float& a : p.a) a = 1;
    for (float& b : p.b) b = 1;
    const auto y = p.scan(level);
    for (std::size_t t = 0; t < y.size(); ++t) CHECK(y[t] == static_cast<float>(5000 - t % 5000));
  }
}

TEST_CASE("`a` at a segment's end is not read, and y is b there to the bit") {
  for (const SimdLevel level : simd_levels()) {
    for (const float unread : {kNan, kInfinity, 3e38F}) {
      Problem p({3, 1, 0, 200, 70, 5000});
      for (const std::int32_t end : {3, 4, 204, 274, 5274}) p.a[static_cast<std::size_t>(end - 1)] = unread;
      const auto y = p.scan(level);
      check_close(y, p.truth());
      for (const std::size_t last : {2, 3, 203, 273, 5273}) CHECK(y[last] == p.b[last]);
    }
  }
}

TEST_CASE("what is not finite in one segment leaves the others alone") {
  for (const SimdLevel level : simd_levels()) {
    for (std::int32_t at = 100; at < 300; ++at) {
      for (const float poison : {kNan, kInfinity}) {
        Problem p({100, 200, 100});
        const auto wanted = p.truth();
        p.b[static_cast<std::size_t>(at)] = poison;
        auto y = p.scan(level);
        CHECK(!std::isfinite(y[100]));
        for (std::size_t t = 100; t <= static_cast<std::size_t>(at); ++t) y[t] = static_cast<float>(wanted[t]);
        check_close(y, wanted);
      }
    }
  }
}

TEST_CASE("an overflow out of finite numbers stays in its segment") {
  for (const SimdLevel level : simd_levels()) {
    for (std::int32_t length = 1; length < 70; ++length) {
      Problem p({length, 80 - length, 100});
      const auto wanted = p.truth();
      p.b[79] = 3e38F;
      for (std::int32_t t = length; t < 79; ++t) p.a[static_cast<std::size_t>(t)] = 1e30F;
      auto y = p.scan(level);
      CHECK(std::isinf(y[static_cast<std::size_t>(length)]));
      for (auto t = static_cast<std::size_t>(length); t < 80; ++t) y[t] = static_cast<float>(wanted[t]);
      check_close(y, wanted);
    }
  }
}

template <class Offset>
void check_copies() {
  const auto copy = [](const std::vector<Offset>& cu, std::int64_t total) {
    std::vector<std::int32_t> out(cu.size() + 1, -7);
    const bool rises = archer_fast::copy_offsets(std::span<const Offset>(cu), total, out.data());
    CHECK(out.back() == -7);
    out.pop_back();
    if (rises) CHECK(std::equal(out.begin(), out.end(), cu.begin()));
    return rises;
  };
  CHECK(copy({0}, 0));
  CHECK(copy({0, 0, 3, 3, 9}, 9));
  CHECK_FALSE(copy({0}, 1));
  CHECK_FALSE(copy({1, 9}, 9));
  CHECK_FALSE(copy({0, 8}, 9));
  CHECK_FALSE(copy({0, 5, 3, 9}, 9));
  CHECK_FALSE(copy({0, -1, 9}, 9));
}

TEST_CASE("offsets that do not rise from 0 to the end are told") {
  check_copies<std::int32_t>();
  check_copies<std::int64_t>();
  const std::vector<std::int64_t> wraps = {0, (std::int64_t{1} << 32) + 9};
  std::int32_t out[2];
  CHECK_FALSE(archer_fast::copy_offsets(std::span(wraps), 9, out));
}
