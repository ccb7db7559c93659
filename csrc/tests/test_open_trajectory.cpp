#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "example.h"
#include "open_trajectory.h"

using archer_fast::NewTrajectory;
using archer_fast::OpenTrajectory;
using archer_fast::testing::Example;
using Tokens = std::vector<std::int32_t>;
using Scores = std::vector<float>;

namespace {

void play(OpenTrajectory& game) {
  game.add_turn(Tokens{17, 9}, Tokens{41, 8, 2}, Scores{-0.1F, -0.2F, -0.3F}, -1.0F, 7);
  game.add_turn(Tokens{12}, Tokens{5, 2}, Scores{-0.4F, -0.5F}, 0.0F, 8);
}

}  // namespace

TEST_CASE("turn by turn is the same as at once") {
  OpenTrajectory game(0, 3);
  play(game);
  CHECK(game.num_turns() == 2);
  const Example example;
  const NewTrajectory wanted = example.view();
  game.close(Tokens{1, 2, 3}, true, false);  // asked again, the last answer holds
  const NewTrajectory got = game.close(Tokens{30}, true, false);
  CHECK(std::ranges::equal(got.tokens, wanted.tokens));
  CHECK(std::ranges::equal(got.observation_lengths, wanted.observation_lengths));
  CHECK(std::ranges::equal(got.action_lengths, wanted.action_lengths));
  CHECK(std::ranges::equal(got.rollout_logprobs, wanted.rollout_logprobs));
  CHECK(std::ranges::equal(got.rewards, wanted.rewards));
  CHECK(std::ranges::equal(got.policy_versions, wanted.policy_versions));
  CHECK(got.terminated);
  CHECK(!got.truncated);
  CHECK(got.task_id == 3);
}

TEST_CASE("a turn after a refused end follows the last turn, not the final observation") {
  OpenTrajectory game(0, 0);
  game.add_turn(Tokens{1}, Tokens{2}, Scores{-1.0F}, 0.0F, 0);
  game.close(Tokens{30}, false, false);
  game.add_turn(Tokens{3}, Tokens{4}, Scores{-1.0F}, 0.0F, 0);
  CHECK(std::ranges::equal(game.close({}, true, false).tokens, Tokens{1, 2, 3, 4}));
}

TEST_CASE("a bad turn is named and changes nothing") {
  OpenTrajectory game(42, 0);
  play(game);
  const Tokens one{1};
  const Scores score{-1.0F};
  CHECK_THROWS_WITH_AS(game.add_turn({}, one, score, 0, 0), "observation_ids: wanted at least 1 token, got none",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(game.add_turn(one, {}, {}, 0, 0), "action_ids: wanted at least 1 token, got none",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(game.add_turn(one, one, {}, 0, 0), "rollout_logprobs: wanted one per action token (1), got 0",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(game.add_turn(Tokens{42}, one, score, 0, 0),
                       "observation_ids[0]: wanted a token id below vocab_size = 42, got 42", std::invalid_argument);
  CHECK_THROWS_WITH_AS(game.add_turn(one, Tokens{-1}, score, 0, 0),
                       "action_ids[0]: wanted a token id of 0 or more, got -1", std::invalid_argument);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS_WITH_AS(game.add_turn(one, one, Scores{nan}, 0, 0),
                       "rollout_logprobs[0]: wanted a finite number, got nan", std::invalid_argument);
  CHECK_THROWS_WITH_AS(game.add_turn(one, one, score, nan, 0), "reward: wanted a finite number, got nan",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(game.close(Tokens{42}, true, false),
                       "final_observation_ids[0]: wanted a token id below vocab_size = 42, got 42",
                       std::invalid_argument);
  CHECK(std::ranges::equal(game.close(Tokens{30}, true, false).tokens, Example{}.tokens));
}
