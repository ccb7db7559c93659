#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "turn_priorities.h"

using archer_fast::CounterRng;
using archer_fast::TurnPriorities;
using archer_fast::UniformSampler;
using Ids = std::vector<std::int64_t>;
using Numbers = std::vector<double>;

namespace {

void push(TurnPriorities& priorities, std::int64_t count) {
  priorities.reserve(count);
  priorities.push_back(count);
}

}  // namespace

TEST_CASE("a new turn has the largest priority ever seen, and stale ids are counted") {
  TurnPriorities priorities;
  push(priorities, 4);
  CHECK(priorities.num_bytes() == 0);  // nobody has asked for anything yet
  CHECK(priorities.from(1) == Numbers{1.0, 1.0, 1.0});
  CHECK(priorities.update(Ids{1, 3, 1}, Numbers{0.5, 6.0, 0.25}) == 0);
  push(priorities, 1);
  CHECK(priorities.from(0) == Numbers{1.0, 0.25, 1.0, 6.0, 6.0});
  priorities.pop_front(4);
  CHECK(priorities.update(Ids{4, 3, 0}, Numbers{2.0, 100.0, 0.0}) == 2);
  CHECK(priorities.max_seen() == 6.0);  // what is gone sets nothing
  push(priorities, 1);
  CHECK(priorities.from(4) == Numbers{2.0, 6.0});
}

TEST_CASE("a refused update changes nothing") {
  TurnPriorities priorities;
  push(priorities, 3);
  priorities.pop_front(1);
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  CHECK_THROWS_WITH_AS(priorities.update(Ids{1, 3}, Numbers{9.0, 9.0}),
                       "turn_ids[1]: wanted an id in [0, 3), which a turn has or has had, got 3", std::out_of_range);
  CHECK_THROWS_AS(priorities.update(Ids{-1}, Numbers{9.0}), std::out_of_range);
  CHECK_THROWS_WITH_AS(priorities.update(Ids{1, 2}, Numbers{9.0, -0.5}), "priorities[1]: wanted 0 to 1e+200, got -0.5",
                       std::invalid_argument);
  CHECK_THROWS_AS(priorities.update(Ids{1, 0}, Numbers{9.0, nan}), std::invalid_argument);  // stale or not
  CHECK_THROWS_AS(priorities.update(Ids{1}, Numbers{infinity}), std::invalid_argument);
  CHECK_THROWS_AS(priorities.update(Ids{1}, Numbers{1e201}), std::invalid_argument);
  CHECK_THROWS_WITH_AS(priorities.update(Ids{1, 2}, Numbers{9.0}), "priorities: wanted one per turn id (2), got 1",
                       std::invalid_argument);
  CHECK(priorities.from(1) == Numbers{1.0, 1.0});
  CHECK(priorities.max_seen() == 1.0);
}

TEST_CASE("each slice of the whole has one draw, and weights are by hand") {
  TurnPriorities priorities;
  push(priorities, 5);
  priorities.update(Ids{0, 1, 2, 3, 4}, Numbers{1.0, 0.5, 0.0, 0.5, 2.0});
  UniformSampler sampler(CounterRng(0));
  Ids ids(8);
  std::vector<float> weights(8);
  priorities.draw(sampler, 1.0, ids, weights);
  CHECK(ids == Ids{0, 0, 1, 3, 4, 4, 4, 4});  // slices of 1/2 each: no chance is left
  CHECK(weights == std::vector<float>{0.5F, 0.5F, 1.0F, 1.0F, 0.25F, 0.25F, 0.25F, 0.25F});
  CHECK(sampler.rng().counter() == 8);
  priorities.draw(sampler, 0.5, ids, weights);
  CHECK(weights[0] == doctest::Approx(std::sqrt(0.5)));
  CHECK(weights[7] == 0.5F);
  priorities.draw(sampler, 0.0, ids, weights);
  CHECK(weights == std::vector<float>(8, 1.0F));
}

TEST_CASE("a draw that cannot be is refused and draws nothing") {
  TurnPriorities priorities;
  UniformSampler sampler(CounterRng(0));
  Ids ids(2);
  std::vector<float> weights(2);
  CHECK_THROWS_WITH_AS(priorities.draw(sampler, 0.4, ids, weights), "n: wanted 0 draws from an empty buffer, got 2",
                       std::invalid_argument);
  priorities.draw(sampler, 0.4, {}, {});
  push(priorities, 2);
  for (const double beta : {-0.1, 1.1, std::nan("")}) {
    CHECK_THROWS_AS(priorities.draw(sampler, beta, ids, weights), std::invalid_argument);
  }
  priorities.update(Ids{0, 1}, Numbers{0.0, 0.0});
  CHECK_THROWS_WITH_AS(priorities.draw(sampler, 0.4, ids, weights),
                       "n: wanted 0 draws where every priority is 0, got 2", std::invalid_argument);
  CHECK(sampler.rng().counter() == 0);
}

TEST_CASE("made anew from its numbers it draws the same, whether or not any was changed") {
  for (const bool changed : {false, true}) {
    TurnPriorities old;
    push(old, 5000);
    if (changed) {
      for (std::int64_t id = 0; id < 5000; ++id) {
        old.update(Ids{id}, Numbers{1.0 / static_cast<double>(1 + id % 13)});
      }
    }
    push(old, 300);
    old.pop_front(4700);
    TurnPriorities made_anew(4700, old.from(4700), old.max_seen());
    UniformSampler one(CounterRng(4)), other(CounterRng(4));
    for (int round = 0; round < 20; ++round) {
      Ids ids(64), wanted(64);
      std::vector<float> weights(64), wanted_weights(64);
      old.draw(one, 0.7, wanted, wanted_weights);
      made_anew.draw(other, 0.7, ids, weights);
      CHECK(ids == wanted);
      CHECK(weights == wanted_weights);
      for (TurnPriorities* const each : {&old, &made_anew}) {
        each->update(wanted, Numbers(64, 0.1 * round));
        push(*each, 9);
        each->pop_front(7);
      }
    }
  }
}
