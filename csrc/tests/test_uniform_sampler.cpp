#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <vector>

#include "uniform_sampler.h"

using archer_fast::CounterRng;
using archer_fast::IdRange;
using archer_fast::UniformSampler;

TEST_CASE("draw stays inside the range and reaches all of it") {
  UniformSampler sampler(CounterRng(3));
  std::vector<std::int64_t> ids(1000);
  sampler.draw({10, 15}, ids);
  std::map<std::int64_t, int> counts;
  for (const std::int64_t id : ids) ++counts[id];
  CHECK(counts.begin()->first == 10);
  CHECK(counts.rbegin()->first == 14);
  CHECK(counts.size() == 5);
}

TEST_CASE("draw_distinct makes every ordered choice equally likely") {
  UniformSampler sampler(CounterRng(3));
  std::map<std::array<std::int64_t, 2>, int> counts;
  for (int i = 0; i < 12'000; ++i) {
    std::array<std::int64_t, 2> ids{};
    sampler.draw_distinct({5, 9}, ids);
    ++counts[ids];
  }
  REQUIRE(counts.size() == 12);
  for (const auto& [ids, count] : counts) {
    CHECK(ids[0] != ids[1]);
    CHECK(std::abs(count - 1000) < 150);  // 5 standard deviations
  }
}

TEST_CASE("draw_distinct of everything is a permutation") {
  UniformSampler sampler(CounterRng(9));
  std::vector<std::int64_t> ids(100);
  sampler.draw_distinct({7, 107}, ids);
  std::sort(ids.begin(), ids.end());
  for (std::size_t i = 0; i < ids.size(); ++i) CHECK(ids[i] == static_cast<std::int64_t>(i) + 7);
}

TEST_CASE("too many is refused and draws nothing; none is fine") {
  UniformSampler sampler(CounterRng(9));
  std::vector<std::int64_t> ids(4);
  CHECK_THROWS_WITH_AS(sampler.draw_distinct({7, 10}, ids),
                       "n: wanted at most 3 distinct ids, as many as are live, got 4", std::invalid_argument);
  CHECK_THROWS_AS(sampler.draw({7, 7}, ids), std::invalid_argument);
  sampler.draw({7, 7}, {});
  sampler.draw_distinct({7, 7}, {});
  CHECK(sampler.rng().counter() == 0);
}

TEST_CASE("draw_slices gives one number of each slice, uniform within it") {
  UniformSampler sampler(CounterRng(4));
  double mean = 0.0;
  for (int round = 0; round < 1000; ++round) {
    std::vector<double> numbers(10);
    sampler.draw_slices(25.0, numbers);
    for (std::size_t i = 0; i < 10; ++i) {
      const double begin = 2.5 * static_cast<double>(i);
      CHECK(begin <= numbers[i]);
      CHECK(numbers[i] < begin + 2.5);
      mean += (numbers[i] - begin) / 2.5 / 10'000;
    }
  }
  CHECK(std::abs(mean - 0.5) < 0.015);  // 5 standard deviations
  CHECK(sampler.rng().counter() == 10'000);
}

TEST_CASE("draw_slices is the same on every machine, to the last bit") {
  UniformSampler sampler(CounterRng(7));
  std::vector<double> numbers(3);
  sampler.draw_slices(10.0, numbers);
  CHECK(numbers[0] == 0x1.33d7eefc7dc90p+1);
  CHECK(numbers[1] == 0x1.5fefda53004c4p+2);
  CHECK(numbers[2] == 0x1.0feeea36d453fp+3);
}
