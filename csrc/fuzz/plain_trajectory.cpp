#include "plain_trajectory.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace archer_fast::fuzzing {

NewTrajectory PlainTrajectory::view() const noexcept {
  return {.tokens = tokens,
          .observation_lengths = observation_lengths,
          .action_lengths = action_lengths,
          .rollout_logprobs = rollout_logprobs,
          .rewards = rewards,
          .policy_versions = policy_versions,
          .terminated = terminated,
          .truncated = truncated,
          .task_id = task_id};
}

bool PlainTrajectory::fits(const BufferOptions& options) const {
  const std::size_t num_turns = rewards.size();
  if (num_turns == 0 || observation_lengths.size() != num_turns || action_lengths.size() != num_turns ||
      policy_versions.size() != num_turns || terminated == truncated ||
      static_cast<std::int64_t>(tokens.size()) > options.max_tokens) {
    return false;
  }
  const auto is_length = [](std::int32_t length) { return length >= 1; };
  const auto is_token = [&](std::int32_t id) {
    return id >= 0 && (options.vocab_size == 0 || id < options.vocab_size);
  };
  const auto is_finite = [](float value) { return std::isfinite(value); };
  const auto sum = [](const std::vector<std::int32_t>& lengths) {
    return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
  };
  return std::all_of(observation_lengths.begin(), observation_lengths.end(), is_length) &&
         std::all_of(action_lengths.begin(), action_lengths.end(), is_length) &&
         sum(action_lengths) == std::ssize(rollout_logprobs) &&
         sum(observation_lengths) + sum(action_lengths) <= std::ssize(tokens) &&
         std::all_of(tokens.begin(), tokens.end(), is_token) &&
         std::all_of(rewards.begin(), rewards.end(), is_finite) &&
         std::all_of(rollout_logprobs.begin(), rollout_logprobs.end(), is_finite);
}

PlainTrajectory whole_trajectory(FuzzInput& input, std::int64_t vocab_size) {
  PlainTrajectory made;
  const std::size_t num_turns = 1 + input.below(4);
  const std::int64_t end = vocab_size > 0 ? vocab_size : std::int64_t{1} << 31;
  const std::int64_t start = input.byte();
  // One byte says all tokens, and of two trajectories few are alike.
  const auto add_tokens = [&](std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      const std::int64_t mixed = (start + 1) * 7919 + std::ssize(made.tokens) * 104729;
      made.tokens.push_back(static_cast<std::int32_t>(mixed % end));
    }
  };
  for (std::size_t turn = 0; turn < num_turns; ++turn) {
    const std::uint8_t lengths = input.byte();
    const std::size_t observation = 1 + lengths % 4, action = 1 + lengths / 4 % 4;
    add_tokens(observation + action);
    made.observation_lengths.push_back(static_cast<std::int32_t>(observation));
    made.action_lengths.push_back(static_cast<std::int32_t>(action));
    for (std::size_t i = 0; i < action; ++i) {
      made.rollout_logprobs.push_back(-static_cast<float>(start + std::ssize(made.rollout_logprobs)) / 16.0F);
    }
    made.rewards.push_back(static_cast<float>(input.bits<std::int8_t>()) / 4.0F);
    made.policy_versions.push_back(input.once_in(8) ? input.edge<std::int64_t>() : lengths / 32);
  }
  const std::uint8_t end_of_game = input.byte();
  add_tokens(end_of_game % 4);
  made.terminated = end_of_game % 8 >= 4;
  made.truncated = !made.terminated;
  made.task_id = end_of_game >= 248 ? input.edge<std::int32_t>() : end_of_game / 8 % 4;
  return made;
}

PlainTrajectory any_trajectory(FuzzInput& input, std::int64_t vocab_size) {
  PlainTrajectory made = whole_trajectory(input, vocab_size);
  while (input.once_in(4)) {
    switch (input.below(8)) {
      case 0:
        damage(input, made.tokens);
        break;
      case 1:
        damage(input, made.observation_lengths);
        break;
      case 2:
        damage(input, made.action_lengths);
        break;
      case 3:
        damage(input, made.rollout_logprobs);
        break;
      case 4:
        damage(input, made.rewards);
        break;
      case 5:
        damage(input, made.policy_versions);
        break;
      case 6:
        made.terminated = !made.terminated;
        break;
      default:
        made.truncated = !made.truncated;
        break;
    }
  }
  return made;
}

}  // namespace archer_fast::fuzzing
