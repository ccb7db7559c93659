#include <doctest/doctest.h>

#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "example.h"

using archer_fast::testing::Example;

TEST_CASE("a whole trajectory passes, with and without a final observation") {
  Example example;
  CHECK_NOTHROW(example.view().check(0));
  example.tokens.pop_back();
  CHECK_NOTHROW(example.view().check(0));
}

TEST_CASE("each fault is named") {
  const auto message = [](const std::function<void(Example&)>& spoil) -> std::string {
    Example example;
    spoil(example);
    try {
      example.view().check(0);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "no error";
  };
  CHECK(message([](Example& e) { e.observation_lengths.clear(); }) ==
        "observation_lengths: wanted at least one turn, got none");
  CHECK(message([](Example& e) { e.action_lengths.pop_back(); }) == "action_lengths: wanted one per turn (2), got 1");
  CHECK(message([](Example& e) { e.rewards.push_back(0); }) == "rewards: wanted one per turn (2), got 3");
  CHECK(message([](Example& e) { e.policy_versions.clear(); }) == "policy_versions: wanted one per turn (2), got 0");
  CHECK(message([](Example& e) { e.observation_lengths[1] = 0; }) ==
        "observation_lengths[1]: wanted at least 1 token, got 0");
  CHECK(message([](Example& e) { e.action_lengths[0] = -3; }) == "action_lengths[0]: wanted at least 1 token, got -3");
  CHECK(message([](Example& e) { e.tokens.resize(7); }) ==
        "tokens: wanted at least observation_lengths + action_lengths = 8, got 7");
  CHECK(message([](Example& e) { e.rollout_logprobs.pop_back(); }) ==
        "rollout_logprobs: wanted one per action token (5), got 4");
  CHECK(message([](Example& e) { e.truncated = true; }) ==
        "terminated, truncated: wanted exactly one true, got terminated=1, truncated=1");
  CHECK(message([](Example& e) { e.terminated = false; }) ==
        "terminated, truncated: wanted exactly one true, got terminated=0, truncated=0");
  CHECK(message([](Example& e) { e.tokens[4] = -5; }) == "tokens[4]: wanted a token id of 0 or more, got -5");
  CHECK(message([](Example& e) { e.rewards[1] = std::numeric_limits<float>::quiet_NaN(); }) ==
        "rewards[1]: wanted a finite number, got nan");
  CHECK(message([](Example& e) { e.rollout_logprobs[0] = -std::numeric_limits<float>::infinity(); }) ==
        "rollout_logprobs[0]: wanted a finite number, got -inf");
}

TEST_CASE("an id of the vocabulary's size is none of it") {
  Example example;  // its largest id is 41
  CHECK_NOTHROW(example.view().check(42));
  CHECK_THROWS_WITH_AS(example.view().check(41), "tokens[2]: wanted a token id below vocab_size = 41, got 41",
                       std::invalid_argument);
  example.tokens[1] = -1;
  CHECK_THROWS_WITH_AS(example.view().check(42), "tokens[1]: wanted a token id of 0 or more, got -1",
                       std::invalid_argument);
}
