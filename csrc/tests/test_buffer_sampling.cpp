// What is drawn from a TrajectoryBuffer, and what is counted of it.
#include <doctest/doctest.h>

#include <algorithm>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "example.h"
#include "trajectory_buffer.h"

using archer_fast::NewTrajectory;
using archer_fast::TrajectoryBuffer;
using archer_fast::TurnQuery;
using archer_fast::testing::Example;
using Ids = std::vector<std::int64_t>;

namespace {

// One turn for each version.
Example game_of(std::vector<std::int64_t> versions) {
  Example game;
  game.tokens.assign(2 * versions.size(), 5);
  game.observation_lengths.assign(versions.size(), 1);
  game.action_lengths.assign(versions.size(), 1);
  game.rollout_logprobs.assign(versions.size(), -0.5F);
  game.rewards.assign(versions.size(), 0.0F);
  game.policy_versions = std::move(versions);
  return game;
}

void push(TrajectoryBuffer& buffer, std::vector<std::int64_t> versions, std::int32_t task_id = 0) {
  const Example game = game_of(std::move(versions));
  NewTrajectory trajectory = game.view();
  trajectory.task_id = task_id;
  buffer.push(trajectory);
}

Ids all_of(TrajectoryBuffer& buffer, std::size_t n, const TurnQuery& query) {
  Ids ids(n);
  buffer.sample_turns(ids, query);
  std::sort(ids.begin(), ids.end());
  return ids;
}

}  // namespace

TEST_CASE("turns recent enough are found whatever the order of the versions") {
  TrajectoryBuffer buffer({1000, 4, 0});
  push(buffer, {9, 9, 9});
  push(buffer, {3, 3});     // turns 3, 4
  push(buffer, {7, 3, 8});  // 5, 6, 7
  push(buffer, {5});        // 8
  push(buffer, {4, 6});     // 9, 10; the first game leaves
  const auto recent = [&](std::size_t n, std::int64_t version) {
    return all_of(buffer, n, {.replacement = false, .min_policy_version = version});
  };
  CHECK(recent(8, 3) == Ids{3, 4, 5, 6, 7, 8, 9, 10});
  CHECK(recent(5, 4) == Ids{5, 7, 8, 9, 10});
  CHECK(recent(3, 6) == Ids{5, 7, 10});
  CHECK(recent(1, 8) == Ids{7});
  CHECK_THROWS_WITH_AS(recent(1, 9), "min_policy_version: wanted at most 8, the newest of a live turn, got 9",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(recent(4, 6), "n: wanted at most 3 distinct ids, as many as there are to choose from, got 4",
                       std::invalid_argument);
  push(buffer, {8});  // 11; the answer to the last question must not be given again
  CHECK(recent(4, 6) == Ids{5, 7, 10, 11});
}

TEST_CASE("equal numbers of turns and of trajectories of each task") {
  TrajectoryBuffer buffer({1000, 100, 0});
  for (int i = 0; i < 6; ++i) push(buffer, {i, i}, i % 3 == 0 ? 5 : -2);  // trajectories 0, 3 and 1, 2, 4, 5
  CHECK(all_of(buffer, 8, {.replacement = false, .by_task = true}).size() == 8);
  Ids ids(4);
  buffer.sample_turns(ids, {.by_task = true});
  buffer.trajectory_of(ids, ids);
  for (const std::size_t i : {0U, 1U}) CHECK(ids[i] % 3 != 0);
  for (const std::size_t i : {2U, 3U}) CHECK(ids[i] % 3 == 0);
  buffer.sample_turns(ids, {.replacement = false, .min_policy_version = 3, .by_task = true});
  CHECK(std::set(ids.begin() + 2, ids.end()) == std::set<std::int64_t>{6, 7});
  buffer.sample_trajectories(ids, true);
  CHECK(std::set(ids.begin() + 2, ids.end()) == std::set<std::int64_t>{0, 3});
  Ids too_many(6);
  CHECK_THROWS_AS(buffer.sample_trajectories(too_many, true), std::invalid_argument);
}

TEST_CASE("stats are those of the live turns") {
  TrajectoryBuffer buffer({1000, 6, 0});
  const std::int64_t empty = buffer.stats().num_bytes;
  CHECK(buffer.stats().turns_by_age.empty());
  push(buffer, {1, 1, 1});
  for (std::int64_t i = 0; i < 6; ++i) push(buffer, std::vector<std::int64_t>(static_cast<std::size_t>(i + 1), 9 - i));
  const auto stats = buffer.stats();
  using Histogram = std::vector<std::pair<std::int64_t, std::int64_t>>;
  CHECK(stats.num_trajectories == 6);
  CHECK(stats.num_turns == 21);
  CHECK(stats.num_tokens == 42);
  CHECK(stats.num_evicted == 1);
  CHECK(stats.num_bytes > empty + 21 * 24 + 42 * 4);
  CHECK(stats.turns_by_age == Histogram{{0, 6}, {1, 5}, {2, 7}, {4, 3}});
  CHECK(stats.turns_by_version == Histogram{{4, 6}, {5, 5}, {6, 4}, {7, 3}, {8, 2}, {9, 1}});
}

TEST_CASE("a snapshot holds the later trajectories and the scalars of all") {
  TrajectoryBuffer buffer({1000, 3, 6});
  for (std::int64_t i = 0; i < 5; ++i) push(buffer, {i, i + 1}, static_cast<std::int32_t>(i));
  buffer.update_priorities(Ids{4, 9}, std::vector{0.5, 3.0});
  const auto all = buffer.state(), part = buffer.snapshot(4).since;
  CHECK(all.priorities == std::vector{0.5, 1.0, 1.0, 1.0, 1.0, 3.0});
  CHECK(all.task_ids == std::vector<std::int32_t>{2, 3, 4});
  CHECK(part.first_trajectory_id == 2);
  CHECK(part.first_turn_id == 4);
  CHECK(part.max_priority == 3.0);
  CHECK(part.priorities == std::vector{1.0, 3.0});
  CHECK(part.task_ids == std::vector<std::int32_t>{4});
  CHECK(part.policy_versions == std::vector<std::int64_t>{4, 5});
  CHECK(part.num_tokens == std::vector<std::int32_t>{4});
  CHECK(part.tokens.size() == 4);
  CHECK(buffer.snapshot(-7).since.tokens == all.tokens);
  CHECK(buffer.snapshot(5).since.tokens.empty());
  CHECK(buffer.snapshot(5).since.priorities.empty());
  CHECK_THROWS_WITH_AS(buffer.snapshot(6), "first_trajectory_id: wanted at most the next id, 5, got 6",
                       std::out_of_range);
}

TEST_CASE("every kind of draw goes on after a restore") {
  TrajectoryBuffer buffer({400, 60, 8});
  for (std::int64_t i = 0; i < 200; ++i) push(buffer, {i % 7, i % 5, i}, static_cast<std::int32_t>(i % 3));
  Ids ids(30);
  std::vector<float> weights(30);
  buffer.sample_prioritised(0.4, ids, weights);
  buffer.update_priorities(ids, std::vector<double>(30, 2.5));
  const auto restored = TrajectoryBuffer::restore(buffer.state());
  for (std::int64_t round = 0; round < 10; ++round) {
    Ids other(30);
    std::vector<float> other_weights(30);
    buffer.sample_prioritised(0.4, ids, weights);
    restored->sample_prioritised(0.4, other, other_weights);
    CHECK(ids == other);
    CHECK(weights == other_weights);
    const std::vector<double> changed(30, 0.3 * static_cast<double>(round));
    buffer.update_priorities(ids, changed);
    restored->update_priorities(ids, changed);
    const TurnQuery query{.replacement = round % 2 == 0, .min_policy_version = 3, .by_task = round % 3 == 0};
    buffer.sample_turns(ids, query);
    restored->sample_turns(other, query);
    CHECK(ids == other);
    for (TrajectoryBuffer* const each : {&buffer, restored.get()}) push(*each, {round, 6}, 1);
  }
  CHECK(buffer.priorities() == restored->priorities());
  CHECK(buffer.stats().turns_by_version == restored->stats().turns_by_version);
}
