#include <doctest/doctest.h>

#include <array>
#include <cstdlib>

#include "counter_rng.h"

using archer_fast::CounterRng;

TEST_CASE("the words of a seed are the same on every machine") {
  CounterRng rng(0);
  CHECK(rng.next() == 0xA706DD2F4D197E6FU);
  CHECK(rng.next() == 0xB382A305F4414F5EU);
  CounterRng other(42);
  CHECK(other.next() == 0x57E1FABA65107204U);
}

TEST_CASE("(seed, counter) is the whole state") {
  CounterRng rng(7);
  for (int i = 0; i < 10; ++i) rng.below(6);
  CounterRng resumed(rng.seed(), rng.counter());
  for (int i = 0; i < 100; ++i) CHECK(rng.next() == resumed.next());
}

TEST_CASE("neighbouring seeds, and seeds one golden ratio apart, share no word") {
  constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15U;
  for (const std::uint64_t step : {std::uint64_t{1}, kGolden}) {
    CounterRng rng(5), other(5 + step);
    const std::uint64_t first = other.next();
    for (int i = 0; i < 100; ++i) CHECK(rng.next() != first);
  }
}

TEST_CASE("below is uniform, also for a bound just above half of 2^64") {
  CounterRng rng(1);
  std::array<int, 3> counts{};
  for (int i = 0; i < 30'000; ++i) ++counts.at(rng.below(3));
  for (const int count : counts) CHECK(std::abs(count - 10'000) < 400);  // 4.9 standard deviations

  constexpr std::uint64_t kBound = (std::uint64_t{1} << 63U) + 1;
  int upper = 0;
  for (int i = 0; i < 10'000; ++i) upper += rng.below(kBound) >= kBound / 2 ? 1 : 0;
  CHECK(std::abs(upper - 5'000) < 250);
  CHECK(rng.counter() > 30'000 + 15'000);  // about half of the words were rejected
}
