#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <vector>

#include "task_strata.h"

using archer_fast::CounterRng;
using archer_fast::IdRange;
using archer_fast::TaskStrata;
using archer_fast::UniformSampler;
using Ids = std::vector<std::int64_t>;

namespace {

Ids draw(const TaskStrata& strata, UniformSampler& sampler, bool replacement, std::size_t n) {
  Ids ids(n);
  strata.draw(sampler, replacement, ids);
  return ids;
}

}  // namespace

TEST_CASE("one task of one run draws what the sampler draws") {
  TaskStrata strata;
  strata.add(0, {10, 14});
  strata.add(0, {14, 30});
  UniformSampler mine(CounterRng(3)), plain(CounterRng(3));
  Ids wanted(50);
  plain.draw({10, 30}, wanted);
  CHECK(draw(strata, mine, true, 50) == wanted);
  wanted.resize(20);
  plain.draw_distinct({10, 30}, wanted);
  CHECK(draw(strata, mine, false, 20) == wanted);
}

TEST_CASE("all distinct ids of a task with gaps are its ids") {
  TaskStrata strata;
  for (const IdRange run : {IdRange{3, 5}, IdRange{5, 6}, IdRange{9, 10}, IdRange{20, 23}}) strata.add(-4, run);
  CHECK(strata.size() == 7);
  UniformSampler sampler(CounterRng(1));
  Ids ids = draw(strata, sampler, false, 7);
  std::sort(ids.begin(), ids.end());
  CHECK(ids == Ids{3, 4, 5, 9, 20, 21, 22});
}

TEST_CASE("tasks come in ascending order with equal shares, and the rest goes to each equally often") {
  TaskStrata strata;
  strata.add(7, {0, 100});
  strata.add(-1, {100, 103});
  strata.add(2, {103, 110});
  strata.add(7, {110, 120});
  UniformSampler sampler(CounterRng(5));
  std::map<int, int> extra;
  for (int round = 0; round < 3000; ++round) {
    const Ids ids = draw(strata, sampler, true, 10);
    const auto task_of = [](std::int64_t id) { return id < 100 || id >= 110 ? 2 : id < 103 ? 0 : 1; };
    CHECK(std::is_sorted(ids.begin(), ids.end(), [&](auto a, auto b) { return task_of(a) < task_of(b); }));
    std::vector<int> counts(3);
    for (const std::int64_t id : ids) ++counts[static_cast<std::size_t>(task_of(id))];
    for (int task = 0; task < 3; ++task) {
      const int count = counts[static_cast<std::size_t>(task)];
      CHECK((count == 3 || count == 4));
      if (count == 4) ++extra[task];
    }
  }
  for (const auto& [task, count] : extra) CHECK(std::abs(count - 1000) < 130);  // 5 standard deviations
}

TEST_CASE("distinct shares respect what each task has") {
  TaskStrata strata;
  strata.add(1, {0, 2});
  strata.add(2, {2, 12});
  UniformSampler sampler(CounterRng(5));
  for (int round = 0; round < 50; ++round) {
    const Ids ids = draw(strata, sampler, false, 5);  // task 1 has no third one
    CHECK(std::count_if(ids.begin(), ids.end(), [](std::int64_t id) { return id < 2; }) == 2);
  }
  const std::uint64_t drawn = sampler.rng().counter();
  CHECK_THROWS_WITH_AS(draw(strata, sampler, false, 6),
                       "n: wanted at most 2 distinct ids of task 1, got 3 as its share of 6", std::invalid_argument);
  CHECK_THROWS_WITH_AS(draw(strata, sampler, false, 13),
                       "n: wanted at most 12 distinct ids, as many as there are to choose from, got 13",
                       std::invalid_argument);
  strata.add(3, {12, 14});
  strata.add(4, {14, 16});
  CHECK_THROWS_WITH_AS(draw(strata, sampler, false, 10),
                       "n: wanted at most 9 distinct ids in equal shares of 4 tasks, got 10", std::invalid_argument);
  CHECK_THROWS_AS(draw(TaskStrata{}, sampler, true, 1), std::invalid_argument);
  CHECK(draw(TaskStrata{}, sampler, true, 0).empty());
  CHECK(sampler.rng().counter() == drawn);
}
